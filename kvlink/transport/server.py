"""Servers: the two services, health and reflection, on one port.

Off loopback a server refuses to start without credentials, or `insecure=True` in so many words: a
KV cache can be inverted to the text it was made from.

Does not know: models, codecs, what a frame says. Place on the path: the edge of both agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvlink.bounds import MESSAGE
from kvlink.errors import ConfigError, RemoteProtocolError
from kvlink.transport import convert
from kvlink.transport.address import Address
from kvlink.transport.api import Ask, Caller, Delivery, Fetch, ReceiverHandler, SenderHandler
from kvlink.transport.calls import Guard, check_readers, reader, stream, unary
from kvlink.transport.credentials import Credentials
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2

log = logging.getLogger("kvlink.transport")


def _for_us(record: logging.LogRecord) -> bool:
    """Whether what gRPC logs is news: not that a caller was gone before its answer could be sent."""
    gone = record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")
    if gone:
        log.debug("a caller was gone before its answer")
    return not gone


logging.getLogger("grpc._cython.cygrpc").addFilter(_for_us)

_THREADS = 64
_SWEEP_S = 5.0
_TELL_S = 1.0
"""For the last words of calls that are cut off."""
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE.most),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # on a slow line the answer waits behind a chunk
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_connection_age_ms", 1_800_000),  # a peer whose certificate has expired must come again
    ("grpc.http2.lookahead_bytes", 4_000_000),  # a window for a fast line with a long way
]


class _Agent:
    def __init__(self, handler: Any, guard: Guard) -> None:
        self._handler = handler
        self.guard = guard

    @unary
    async def GetCapabilities(self, request: Any, caller: Caller) -> Any:
        proto = convert.capabilities_to_proto(self._handler.capabilities())
        return common_pb2.GetCapabilitiesResponse(capabilities=proto)


class _Receiver(_Agent):
    @stream(lambda: receiver_pb2.PushCacheResponse(state=receiver_pb2.TRANSFER_STATE_ACCEPTED))
    async def PushCache(self, requests: AsyncIterator[Any], caller: Caller) -> AsyncIterator[Any]:
        frames = (request.frame async for request in requests)
        async with aclosing(self._handler.push_cache(frames, caller)) as statuses:
            async for status in statuses:
                yield convert.push_status_to_proto(status)

    @unary
    async def GetTransferStatus(self, request: Any, caller: Caller) -> Any:
        found = await self._handler.transfer_status(request.transfer_id, caller)
        status = convert.push_status_to_proto(found)
        return receiver_pb2.GetTransferStatusResponse(
            state=status.state, next_sequence=status.next_sequence, cache_id=status.cache_id, why=found.why
        )

    @unary
    async def CancelTransfer(self, request: Any, caller: Caller) -> Any:
        await self._handler.cancel_transfer(request.transfer_id, caller)
        return receiver_pb2.CancelTransferResponse()

    @stream(receiver_pb2.GenerateResponse)
    async def Generate(self, request: Any, caller: Caller) -> AsyncIterator[Any]:
        ask = Ask(
            request.cache_id,
            request.question,
            request.max_new_tokens,
            request.temperature,
            request.seed,
            request.handle,
            request.recipe,
            convert.target_from_proto(request.target),
        )
        async with aclosing(self._handler.generate(ask, caller)) as pieces:
            async for piece in pieces:
                yield receiver_pb2.GenerateResponse(
                    text=piece.text,
                    token_ids=piece.token_ids,
                    done=piece.done,
                    receipt=convert.receipt_to_proto(piece.receipt) if piece.done else None,
                    cache_id=piece.cache_id,
                )

    @unary
    async def DeleteCache(self, request: Any, caller: Caller) -> Any:
        self._handler.delete_cache(request.cache_id, caller)
        return receiver_pb2.DeleteCacheResponse()

    @unary
    async def PutProfile(self, requests: AsyncIterator[Any], caller: Caller) -> Any:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "start":
            raise RemoteProtocolError(
                "PutProfileRequest: the first message says what comes, found another one"
            )
        start = first.start
        await self._handler.put_profile(start.digest, start.total_bytes, _pieces(requests), caller)
        return receiver_pb2.PutProfileResponse(digest=start.digest)


async def _pieces(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The file's bytes behind the first message. Raises RemoteProtocolError for what brings none."""
    async for request in requests:
        if not request.data:
            raise RemoteProtocolError("PutProfileRequest: expected bytes of the profile, found none")
        yield request.data


class _Sender(_Agent):
    @unary
    async def PublishContext(self, request: Any, caller: Caller) -> Any:
        turns = [(turn.role, turn.content) for turn in request.earlier_turns]
        check_readers(request.readers)
        told = replace(caller, readers=tuple(request.readers))
        done = await self._handler.publish(request.text, request.lifetime_s, turns, told, request.extends)
        return sender_pb2.PublishContextResponse(
            context_id=done.context_id,
            context_tokens=done.context_tokens,
            cache_bytes=done.cache_bytes,
            prefill_s=done.prefill_s,
            lifetime_s=done.lifetime_s,
        )

    @unary
    async def UnpublishContext(self, request: Any, caller: Caller) -> Any:
        self._handler.unpublish(request.context_id, caller)
        return sender_pb2.UnpublishContextResponse()

    @stream(lambda: sender_pb2.FetchCacheResponse(heartbeat=common_pb2.Heartbeat()))
    async def FetchCache(self, request: Any, caller: Caller) -> AsyncIterator[Any]:
        fetch = Fetch(
            request.context_id,
            request.question,
            request.recipe,
            convert.target_from_proto(request.target),
            request.transfer_id,
            request.next_sequence,
            request.base_digest,
        )
        async with aclosing(self._handler.fetch_cache(fetch, caller)) as frames:
            async for frame in frames:
                yield sender_pb2.FetchCacheResponse(frame=frame)

    @stream(sender_pb2.DeliverCacheResponse)
    async def DeliverCache(self, request: Any, caller: Caller) -> AsyncIterator[Any]:
        delivery = Delivery(
            receiver=request.receiver,
            question=request.question,
            recipe=request.recipe,
            context_id=request.context_id,
            text=request.text,
            target=convert.target_from_proto(request.target),
            answer_here=request.answer_here,
            explain=request.explain,
            delivery_id=request.delivery_id,
            base_digest=request.base_digest,
        )
        async with aclosing(self._handler.deliver_cache(delivery, caller)) as told:
            async for progress in told:
                yield sender_pb2.DeliverCacheResponse(
                    sent_bytes=progress.sent_bytes,
                    total_bytes=progress.total_bytes,
                    done=progress.done,
                    cache_id=progress.cache_id,
                    sender_answer=progress.sender_answer,
                    receipt=convert.receipt_to_proto(progress.receipt) if progress.done else None,
                    explanation=convert.explanation_to_proto(progress.explanation),
                )

    @unary
    async def CancelDelivery(self, request: Any, caller: Caller) -> Any:
        await self._handler.cancel_delivery(request.delivery_id, caller)
        return sender_pb2.CancelDeliveryResponse()


def _handlers(service: Any, servicer: Any) -> Any:
    """Handlers of all methods of a proto service."""
    found = {}
    for method in service.methods:
        kinds = ("unary", "stream")
        arity = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        asked, told = method.input_type, method.output_type
        found[method.name] = getattr(grpc, f"{arity}_rpc_method_handler")(
            getattr(servicer, method.name),
            request_deserializer=reader(GetMessageClass(asked)),
            response_serializer=GetMessageClass(told).SerializeToString,
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
        credentials: Credentials | None = None,
    ) -> None:
        self._at = Address.parse(address, listening=True)
        if credentials is None:
            self._at.check_open(insecure)
        self._credentials = credentials
        guard = Guard(credentials)
        self._calls = guard.calls
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names: list[str] = []
        if receiver is not None:
            self._add(receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"], _Receiver(receiver, guard))
        if sender is not None:
            self._add(sender_pb2.DESCRIPTOR.services_by_name["SenderService"], _Sender(sender, guard))
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self.port = 0

    def _add(self, service: Any, servicer: Any) -> None:
        self._server.add_generic_rpc_handlers((_handlers(service, servicer),))
        self._names.append(service.full_name)

    async def start(self) -> int:
        """Listen and return the port. Raises ConfigError where the port is taken."""
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(str(self._at))
            else:
                self.port = self._server.add_secure_port(str(self._at), self._credentials.server())
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._at}: is the port taken? ({error})") from error
        if self.port == 0:
            raise ConfigError(f"cannot listen on {self._at}: is the port taken?")
        await self._server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        how = "TLS, both sides prove who they are" if self._credentials else "not encrypted"
        log.info("listening on %s (%s; %s)", replace(self._at, port=self.port), ", ".join(self._names), how)
        return self.port

    async def stop(self, drain_s: float = 5.0) -> None:
        """Say NOT_SERVING, refuse new calls, let those in flight end within `drain_s`, cut off the rest.

        Whoever is refused or cut off is told to try again, and when. 0: close at once.
        """
        await self._health.enter_graceful_shutdown()
        if drain_s and (left := await self._calls.stop(drain_s)):
            log.warning("%d calls did not end within %g s and are cut off", left, drain_s)
        await self._server.stop(min(drain_s, _TELL_S))

    async def run(
        self,
        started: Callable[[int], None],
        sweep: Callable[[], None],
        stopping: Callable[[], None] = lambda: None,
        drain_s: float = 5.0,
    ) -> None:
        """Serve until SIGINT or SIGTERM, then stop. `sweep` is called every few seconds, `stopping` once."""
        loop = asyncio.get_running_loop()
        # A generation holds a thread while it streams; frames must still find one.
        loop.set_default_executor(ThreadPoolExecutor(_THREADS))
        told = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)
        started(await self.start())
        while not told.is_set():
            sweep()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), _SWEEP_S)
        stopping()
        await self.stop(drain_s)
