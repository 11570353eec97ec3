"""Clients of the two services: the calls in the package's own values and errors.

A client dials only whom it may: with credentials the peers that they list, each by the name that its
certificate must bear and with the token meant for it; without, loopback, unless told `insecure`.

Every call has a deadline, and a stream that gives no sign of life for `QUIET_S` is taken for dead.

Does not know: models, codecs, what a frame says. Place on the path: how one agent, or the
command line, reaches another.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvlink.defaults import CALL_S
from kvlink.errors import (
    KvlinkError,
    LimitError,
    PeerUnavailableError,
    RemoteProtocolError,
)
from kvlink.observe import current_parent
from kvlink.receipt import Capabilities
from kvlink.recipe import Wish
from kvlink.transport import convert
from kvlink.transport.address import Address
from kvlink.transport.api import Ask, Delivery, Fetch, Piece, Progress, Published, PushStatus
from kvlink.transport.calls import ASKED_BY, READERS
from kvlink.transport.credentials import Credentials, Dial
from kvlink.transport.reach import listening, refusal
from kvlink.transport.server import MAX_MESSAGE_BYTES
from kvlink.transport.sockets import SocketCount, connections
from kvlink.transport.status import from_rpc_error
from kvlink.v1 import common_pb2, receiver_pb2, receiver_pb2_grpc, sender_pb2, sender_pb2_grpc
from kvlink.wire.messages import TRANSFER_ID_BYTES

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that its bytes can be counted
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # signs of life are faster; this is for calls without them
    ("grpc.http2.max_pings_without_data", 0),
    # Nothing in a machine's environment decides through whose hands a cache goes.
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
    ("grpc.enable_retries", 0),  # a transfer resumes in the protocol
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
CONNECT_S = 10.0
QUICK_S = 20.0
"""The deadline of calls that do no work."""
QUIET_S = 6.5
"""Three signs of life that did not come, and a little."""
ATTEMPTS = 4


def grpc_bytes(message_bytes: Sequence[int]) -> int:
    """Bytes that gRPC adds to messages of these sizes, computed.

    5 for each message, and an HTTP/2 frame header of 9 for each 16,384 bytes of the stream.
    """
    total = sum(message_bytes) + 5 * len(message_bytes)
    return 5 * len(message_bytes) + 9 * math.ceil(total / 16_384)


def _wished(wish: Wish) -> dict[str, Any]:
    """The fields of a request that carry a wish."""
    return {name: getattr(wish, name) for name in ("budget_bytes", "max_bits", "quality", "verify")}


class _Client:
    """A channel to one agent. Use as an async context manager.

    `timeout_s`: the deadline of calls that do work. `trace`: W3C traceparent of the span that the calls
    belong to, else the current one. `patience_s`: how long a peer that refuses connections is taken to be
    on its way up, at most `CONNECT_S`. Raises AccessError and CredentialsError before
    anything is sent, PeerUnavailableError where nobody answers.
    """

    _stub_class: ClassVar[Any]

    def __init__(
        self,
        address: str,
        credentials: Credentials | None = None,
        *,
        insecure: bool = False,
        timeout_s: float = CALL_S,
        trace: str = "",
        patience_s: float = 0.0,
    ) -> None:
        self._at = Address.parse(address)
        self._trace = trace
        self._patience_s = patience_s
        self.address = str(self._at)
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._dial: Dial | None = None
        if credentials is not None:
            self._dial = credentials.dial(self.address)
        else:
            self._at.check_open(insecure, "dial")
        self._channel: Any = None
        self._local_port = 0

    async def __aenter__(self) -> Self:
        before = connections(self._at.host, self._at.port)
        if self._credentials is not None and self._dial is not None:
            options = [*_OPTIONS, ("grpc.ssl_target_name_override", self._dial.name)]
            proof = self._credentials.channel()
            self._channel = grpc.aio.secure_channel(self.address, proof, options=options)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        try:
            await self._ready(self._patience_s)
        except BaseException:
            await self._channel.close()
            raise
        new = set(connections(self._at.host, self._at.port)) - set(before)
        self._local_port = new.pop() if len(new) == 1 else 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def _ready(self, patience_s: float = 0.0) -> None:
        """Wait for a connection. What waiting does not mend is told at once, and why.

        `patience_s`: so long a peer that cannot be reached is taken to be on its way up again.
        """
        began = time.monotonic()
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                why = await refusal(self._at, self._credentials, self._dial)
                patient = isinstance(why, PeerUnavailableError) and time.monotonic() - began < patience_s
                if why is not None and not patient:
                    raise why
            left_s = CONNECT_S - (time.monotonic() - began)
            try:
                await asyncio.wait_for(self._channel.wait_for_state_change(state), left_s)
            except TimeoutError:
                raise PeerUnavailableError(
                    f"{self.address}: no agent answers within {CONNECT_S:g} s{await self._hint()}"
                ) from None
            state = self._channel.get_state(try_to_connect=True)

    async def _hint(self) -> str:
        """What a peer that listens but does not answer may want."""
        if self._dial is not None or await listening(self._at):
            return ""
        return "; something listens there: an agent with TLS needs --credentials here too"

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted on this client's connection; None where it cannot be told."""
        return connections(self._at.host, self._at.port).get(self._local_port)

    async def health(self) -> str:
        """SERVING, NOT_SERVING or UNKNOWN."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        response = await self._unary(stub.Check, health_pb2.HealthCheckRequest(), QUICK_S)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def _shown(self, readers: Sequence[str] = (), asked_by: str = "") -> list[tuple[str, str]]:
        """Metadata of a call: the token that is meant for this peer, and who else may read or remove."""
        token = [("authorization", f"Bearer {self._dial.token}")] if self._dial else []
        parent = self._trace or current_parent()
        trace = [("traceparent", parent)] if parent else []
        asker = [(ASKED_BY, asked_by)] if asked_by else []
        return [*token, *trace, *asker, *((READERS, name) for name in readers)]

    async def _unary(self, method: Any, request: Any, timeout_s: float = 0.0) -> Any:
        try:
            return await method(request, timeout=timeout_s or self.timeout_s, metadata=self._shown())
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    async def _messages(self, call: Any, beats: bool = True) -> AsyncGenerator[Any, None]:
        """The answers of a stream. Raises PeerUnavailableError where none comes for `QUIET_S`, if the
        peer gives signs of life (`beats`)."""
        try:
            while (message := await self._read(call, beats)) is not grpc.aio.EOF:
                yield message
            if await call.code() is not grpc.StatusCode.OK:
                raise from_rpc_error(await _error_of(call), self.address)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        finally:
            call.cancel()

    async def _read(self, call: Any, beats: bool = True) -> Any:
        try:
            return await asyncio.wait_for(call.read(), QUIET_S if beats else None)
        except TimeoutError:
            raise PeerUnavailableError(f"{self.address}: no sign of life for {QUIET_S:g} s") from None

    async def _tell(self, method: Any, request: Any) -> None:
        """A call that may fail: what it says is then found out by the peer's own clock."""
        with contextlib.suppress(KvlinkError, asyncio.CancelledError):
            await asyncio.shield(self._unary(method, request, 2.0))

    async def _again(self, attempt: Callable[[], AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
        """The items of `attempt()`, made again where the link fails.

        Gives up after `ATTEMPTS` that brought nothing new.
        """
        failed, until = 0, time.monotonic() + self.timeout_s
        while True:
            try:
                if failed:
                    await self._ready(CONNECT_S)
                async with contextlib.aclosing(attempt()) as items:
                    async for item in items:
                        failed = 0
                        yield item
                return
            except PeerUnavailableError as error:
                failed += 1
                if error.reported or failed >= ATTEMPTS or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.25 * failed)

    @property
    def _stub(self) -> Any:
        return self._stub_class(self._channel)

    async def capabilities(self) -> Capabilities:
        """What the agent is and can do."""
        request = common_pb2.GetCapabilitiesRequest()
        response = await self._unary(self._stub.GetCapabilities, request, QUICK_S)
        return convert.capabilities_from_proto(response.capabilities)


async def _error_of(call: Any) -> grpc.RpcError:
    """The error that a stream ended with, which reading it to its end does not raise."""
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


class ReceiverClient(_Client):
    """Calls to a receiver agent."""

    _stub_class = receiver_pb2_grpc.ReceiverServiceStub

    async def push(
        self,
        frames: Sequence[bytes],
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
    ) -> AsyncGenerator[PushStatus | int, None]:
        """Send a transfer and yield the receiver's statuses, and frame numbers as they leave.

        Waits for `accepted` before the second frame and continues where the receiver says. `readers`:
        peers that may use the cache beside this one; `asked_by`: one that may remove it too.
        """
        method = self._channel.stream_stream(
            "/kvlink.v1.ReceiverService/PushCache",
            request_serializer=None,
            response_deserializer=receiver_pb2.PushCacheResponse.FromString,
        )
        call = method(timeout=timeout_s or self.timeout_s, metadata=self._shown(readers, asked_by))
        told: asyncio.Queue[PushStatus | int | Exception | None] = asyncio.Queue()
        writer: asyncio.Task[None] | None = None
        reader = asyncio.create_task(self._listen(call, told))
        try:
            await call.write(frames[0])
            while (item := await told.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if writer is None and isinstance(item, PushStatus) and item.state == "accepted":
                    writer = asyncio.create_task(self._write(call, frames, item.next_sequence, told))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._why(call, error) from error
        finally:
            for task in (reader, writer):
                if task is not None:
                    task.cancel()
            call.cancel()

    async def _listen(self, call: Any, told: asyncio.Queue[PushStatus | int | Exception | None]) -> None:
        """Put what the receiver says into `told`, then None, or the error that ended the call."""
        try:
            async for status in self._statuses(call):
                await told.put(status)
            await told.put(None)
        except Exception as error:  # whatever it is belongs to the one who pushes
            await told.put(error)

    async def _statuses(self, call: Any) -> AsyncGenerator[PushStatus, None]:
        """What the receiver says, to the end of the call. Raises where it ends before it accepts."""
        told = 0
        while (message := await self._read(call)) is not grpc.aio.EOF:
            status = convert.push_status_from_proto(message)
            if status.state == "accepted" and (told or not status.next_sequence):
                continue  # a sign of life
            told += 1
            yield status
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise from_rpc_error(await _error_of(call), self.address)
        if not told:
            raise RemoteProtocolError(f"{self.address}: the receiver ended the call before it accepted")

    async def _write(self, call: Any, frames: Sequence[bytes], first: int, sent: asyncio.Queue[Any]) -> None:
        try:
            for number in range(max(1, first), len(frames)):
                await call.write(frames[number])
                sent.put_nowait(number)
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader sees the call's status and raises it

    async def _why(self, call: Any, error: Exception) -> KvlinkError:
        if isinstance(error, grpc.RpcError):
            return from_rpc_error(error, self.address)
        return PeerUnavailableError(f"{self.address}: the call ended: {await call.details()}")

    async def transfer_status(self, transfer_id: bytes) -> PushStatus:
        request = receiver_pb2.GetTransferStatusRequest(transfer_id=transfer_id)
        return convert.push_status_from_proto(
            await self._unary(self._stub.GetTransferStatus, request, QUICK_S)
        )

    async def cancel(self, transfer_id: bytes) -> None:
        """Give up a transfer; a receiver that cannot be reached finds out by its own clock."""
        request = receiver_pb2.CancelTransferRequest(transfer_id=transfer_id)
        await self._tell(self._stub.CancelTransfer, request)

    async def generate(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        request = convert.request(
            receiver_pb2.GenerateRequest,
            cache_id=ask.cache_id,
            question=ask.question,
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
        )
        call = self._stub.Generate(request, timeout=self.timeout_s, metadata=self._shown())
        async with contextlib.aclosing(self._messages(call)) as messages:
            async for message in messages:
                if message.token_ids or message.done:
                    receipt = convert.receipt_from_proto(message.receipt)
                    yield Piece(message.text, tuple(message.token_ids), message.done, receipt)

    async def put_profile(self, data: bytes) -> bytes:
        """Send a profile ahead; its digest. Raises IdentityError where it is another model's."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise LimitError(
                f"a profile of at most {MAX_MESSAGE_BYTES} bytes can be sent, this has {len(data)}"
            )
        done = await self._unary(self._stub.PutProfile, receiver_pb2.PutProfileRequest(data=data))
        return bytes(done.digest)

    async def delete_cache(self, cache_id: str) -> None:
        request = convert.request(receiver_pb2.DeleteCacheRequest, cache_id=cache_id)
        await self._unary(self._stub.DeleteCache, request, QUICK_S)


class SenderClient(_Client):
    """Calls to a sender agent."""

    _stub_class = sender_pb2_grpc.SenderServiceStub

    async def publish(
        self,
        text: str,
        lifetime_s: int = 0,
        turns: Sequence[tuple[str, str]] = (),
        readers: Sequence[str] = (),
    ) -> Published:
        """Let the sender read a text and hold it; `readers` may use it beside this peer."""
        request = convert.request(
            sender_pb2.PublishContextRequest,
            text=text,
            lifetime_s=lifetime_s,
            earlier_turns=[
                convert.request(sender_pb2.Turn, role=role, content=content) for role, content in turns
            ],
            readers=readers,
        )
        done = await self._unary(self._stub.PublishContext, request)
        return Published(
            done.context_id, done.context_tokens, done.cache_bytes, done.prefill_s, done.lifetime_s
        )

    async def unpublish(self, context_id: str) -> None:
        request = convert.request(sender_pb2.UnpublishContextRequest, context_id=context_id)
        await self._unary(self._stub.UnpublishContext, request, QUICK_S)

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[bytes, None]:
        """The frames of a published context. A stream that breaks goes on at the next frame."""
        method = self._channel.unary_stream(
            "/kvlink.v1.SenderService/FetchCache",
            request_serializer=sender_pb2.FetchCacheRequest.SerializeToString,
            response_deserializer=None,
        )
        request = convert.request(
            sender_pb2.FetchCacheRequest,
            context_id=fetch.context_id,
            question=fetch.question,
            recipe=fetch.recipe,
            transfer_id=fetch.transfer_id or secrets.token_bytes(TRANSFER_ID_BYTES),
            next_sequence=fetch.next_sequence,
            **_wished(fetch.wish),
        )

        def frames() -> AsyncGenerator[bytes, None]:
            call = method(request, timeout=self.timeout_s, metadata=self._shown())
            return self._messages(call, beats=False)  # a frame has no room for signs of life

        async with contextlib.aclosing(self._again(frames)) as found:
            async for frame in found:
                request.next_sequence += 1
                yield frame

    async def deliver(self, delivery: Delivery) -> AsyncGenerator[Progress, None]:
        """Let the sender deliver. A link that breaks is made again; leaving early gives it up at both ends."""
        delivery = replace(
            delivery, delivery_id=delivery.delivery_id or secrets.token_bytes(TRANSFER_ID_BYTES)
        )
        ended = False
        try:
            async with contextlib.aclosing(self._again(lambda: self._deliver(delivery))) as told:
                async for progress in told:
                    ended = progress.done
                    yield progress
            ended = True
        except KvlinkError:
            ended = True
            raise
        finally:
            if not ended:
                request = sender_pb2.CancelDeliveryRequest(delivery_id=delivery.delivery_id)
                await self._tell(self._stub.CancelDelivery, request)

    async def _deliver(self, delivery: Delivery) -> AsyncGenerator[Progress, None]:
        request = convert.request(
            sender_pb2.DeliverCacheRequest,
            question=delivery.question,
            recipe=delivery.recipe,
            **_wished(delivery.wish),
            receiver=delivery.receiver,
            answer_here=delivery.answer_here,
            explain=delivery.explain,
            delivery_id=delivery.delivery_id,
            **({"context_id": delivery.context_id} if delivery.context_id else {"text": delivery.text}),
        )
        call = self._stub.DeliverCache(request, timeout=self.timeout_s, metadata=self._shown())
        async with contextlib.aclosing(self._messages(call)) as messages:
            async for message in messages:
                if not message.total_bytes:
                    continue  # a sign of life
                yield Progress(
                    message.sent_bytes,
                    message.total_bytes,
                    message.done,
                    message.cache_id,
                    message.sender_answer,
                    convert.receipt_from_proto(message.receipt),
                    convert.explanation_from_proto(message.explanation),
                )
