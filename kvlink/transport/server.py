"""Servers: the two services, health and reflection, on one port.

Off loopback a server refuses to start without `insecure=True` in so many words: a KV cache can
be inverted to the text it was made from, and this release has no certificates yet.

Does not know: models, codecs, what a frame says. Place on the path: the edge of both agents.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvlink.errors import AccessError, ConfigError, KvlinkError
from kvlink.recipe import Wish
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery, ReceiverHandler, SenderHandler
from kvlink.transport.status import to_status
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2

log = logging.getLogger("kvlink.transport")

MAX_MESSAGE_BYTES = 20_000_000
"""A text to read may be this large; frames have their own, smaller limit."""

_THREADS = 64
_SWEEP_S = 5.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"expected an address as host:port, got {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_listen(address: str, insecure: bool) -> None:
    """Raise AccessError for an address off loopback unless told `insecure` in so many words."""
    if not insecure and not is_loopback(address):
        raise AccessError(
            f"refusing to listen on {address}: traffic off loopback is not encrypted in this release and a KV "
            "cache reveals the text it was made from; say --insecure if the network is yours alone"
        )


async def _refuse(context: Any, error: Exception) -> None:
    """End a call with the error's status; what is not ours is logged and told as internal."""
    if not isinstance(error, KvlinkError):
        log.exception("a call failed")
        error = KvlinkError(f"internal error: {type(error).__name__}; the agent's log has more")
    else:
        log.info("refused: %s: %s", type(error).__name__, error)
    await context.abort_with_status(to_status(error))


def _unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _refuse(context, error)

    return call


def _stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        answers = method(self, request, context)
        try:
            async for message in answers:
                yield message
        except Exception as error:
            await _refuse(context, error)
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    return call


def _wish(request: Any) -> Wish:
    return Wish(request.budget_bytes, request.max_bits, request.quality, request.verify)


class _Agent:
    """What both services answer alike."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    @_unary
    async def GetCapabilities(self, request: Any, context: Any) -> Any:
        proto = convert.capabilities_to_proto(self._handler.capabilities())
        return common_pb2.GetCapabilitiesResponse(capabilities=proto)


class _Receiver(_Agent):
    @_stream
    async def PushCache(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        async for status in self._handler.push_cache(requests):
            yield convert.push_status_to_proto(status)

    @_unary
    async def GetTransferStatus(self, request: Any, context: Any) -> Any:
        status = convert.push_status_to_proto(self._handler.transfer_status(request.transfer_id))
        return receiver_pb2.GetTransferStatusResponse(
            state=status.state, next_sequence=status.next_sequence, cache_id=status.cache_id
        )

    @_stream
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        ask = Ask(
            request.cache_id, request.question, request.max_new_tokens, request.temperature, request.seed
        )
        async for piece in self._handler.generate(ask):
            yield receiver_pb2.GenerateResponse(
                text=piece.text,
                token_ids=piece.token_ids,
                done=piece.done,
                receipt=convert.receipt_to_proto(piece.receipt) if piece.done else None,
            )

    @_unary
    async def DeleteCache(self, request: Any, context: Any) -> Any:
        self._handler.delete_cache(request.cache_id)
        return receiver_pb2.DeleteCacheResponse()

    @_unary
    async def PutProfile(self, request: Any, context: Any) -> Any:
        return receiver_pb2.PutProfileResponse(digest=await self._handler.put_profile(request.data))


class _Sender(_Agent):
    @_unary
    async def PublishContext(self, request: Any, context: Any) -> Any:
        turns = [(turn.role, turn.content) for turn in request.earlier_turns]
        done = await self._handler.publish(request.text, request.lifetime_s, turns)
        return sender_pb2.PublishContextResponse(
            context_id=done.context_id,
            context_tokens=done.context_tokens,
            cache_bytes=done.cache_bytes,
            prefill_s=done.prefill_s,
            lifetime_s=done.lifetime_s,
        )

    @_unary
    async def UnpublishContext(self, request: Any, context: Any) -> Any:
        self._handler.unpublish(request.context_id)
        return sender_pb2.UnpublishContextResponse()

    @_stream
    async def FetchCache(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        frames = self._handler.fetch_cache(
            request.context_id,
            request.question,
            request.recipe,
            _wish(request),
            request.transfer_id,
            request.next_sequence,
        )
        async for frame in frames:
            yield frame

    @_stream
    async def DeliverCache(self, request: Any, context: Any) -> AsyncIterator[Any]:
        delivery = Delivery(
            receiver=request.receiver,
            question=request.question,
            recipe=request.recipe,
            context_id=request.context_id,
            text=request.text,
            wish=_wish(request),
            answer_here=request.answer_here,
            explain=request.explain,
        )
        async for progress in self._handler.deliver_cache(delivery):
            yield sender_pb2.DeliverCacheResponse(
                sent_bytes=progress.sent_bytes,
                total_bytes=progress.total_bytes,
                done=progress.done,
                cache_id=progress.cache_id,
                sender_answer=progress.sender_answer,
                receipt=convert.receipt_to_proto(progress.receipt) if progress.done else None,
                explanation=convert.explanation_to_proto(progress.explanation),
            )


def _handlers(service: Any, servicer: Any) -> Any:
    """Handlers of all methods of a proto service. Bare frames stay bytes, in and out.

    The digest runs over the exact bytes of the frames, so nothing here parses and rewrites them.
    """
    found = {}
    for method in service.methods:
        kinds = ("unary", "stream")
        arity = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        asked, told = method.input_type, method.output_type
        found[method.name] = getattr(grpc, f"{arity}_rpc_method_handler")(
            getattr(servicer, method.name),
            request_deserializer=None if asked.name == "Frame" else GetMessageClass(asked).FromString,
            response_serializer=None if told.name == "Frame" else GetMessageClass(told).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, found)


class Server:
    """A listening agent. `await start()`, then `await stop()`; or `await run(…)`."""

    def __init__(
        self,
        address: str,
        *,
        receiver: ReceiverHandler | None = None,
        sender: SenderHandler | None = None,
        insecure: bool = False,
    ) -> None:
        check_listen(address, insecure)
        self._address = address
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names: list[str] = []
        if receiver is not None:
            self._add(receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"], _Receiver(receiver))
        if sender is not None:
            self._add(sender_pb2.DESCRIPTOR.services_by_name["SenderService"], _Sender(sender))
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self.port = 0

    def _add(self, service: Any, servicer: Any) -> None:
        self._server.add_generic_rpc_handlers((_handlers(service, servicer),))
        self._names.append(service.full_name)

    async def start(self) -> int:
        """Listen and return the port. Raises ConfigError where the port is taken."""
        host, port = split_address(self._address)
        try:
            self.port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._address}: is the port taken? ({error})") from error
        if self.port == 0:
            raise ConfigError(f"cannot listen on {self._address}: is the port taken?")
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening on %s:%d (%s)", host, self.port, ", ".join(self._names))
        return self.port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, let calls in flight end within `grace_s`, then close."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def run(
        self, started: Callable[[int], None], sweep: Callable[[], None], grace_s: float = 5.0
    ) -> None:
        """Serve until SIGINT or SIGTERM, then stop gracefully. `sweep` is called every few seconds."""
        loop = asyncio.get_running_loop()
        # A generation holds a thread while it streams; frames must still find one.
        loop.set_default_executor(ThreadPoolExecutor(_THREADS))
        port = await self.start()
        stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        started(port)
        while not stopping.is_set():
            sweep()
            try:
                await asyncio.wait_for(stopping.wait(), _SWEEP_S)
            except TimeoutError:
                continue
        await self.stop(grace_s)
