"""Clients of the two services: the calls in the package's own values and errors.

Does not know: models, codecs, what a frame says. Place on the path: how one agent, or the
command line, reaches another.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvlink.errors import KvlinkError, LimitError, PeerUnavailableError, RemoteProtocolError
from kvlink.receipt import Capabilities
from kvlink.recipe import Wish
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery, Piece, Progress, Published, PushStatus
from kvlink.transport.server import MAX_MESSAGE_BYTES, split_address
from kvlink.transport.sockets import SocketCount, connections
from kvlink.transport.status import from_rpc_error
from kvlink.v1 import common_pb2, receiver_pb2, receiver_pb2_grpc, sender_pb2, sender_pb2_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that its bytes can be counted
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # a transfer resumes in the protocol
]
CONNECT_S = 10.0
CALL_S = 600.0


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
    """A channel to one agent. Use as an async context manager."""

    _stub_class: ClassVar[Any]

    def __init__(self, address: str) -> None:
        split_address(address)
        self.address = address
        self._channel: Any = None
        self._local_port = 0

    async def __aenter__(self) -> Self:
        before = connections(*split_address(self.address))
        self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except (TimeoutError, grpc.RpcError) as error:
            await self._channel.close()
            raise PeerUnavailableError(f"{self.address}: no agent answers within {CONNECT_S:g} s") from error
        new = set(connections(*split_address(self.address))) - set(before)
        self._local_port = new.pop() if len(new) == 1 else 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted on this client's connection; None where it cannot be told."""
        return connections(*split_address(self.address)).get(self._local_port)

    async def health(self) -> str:
        """SERVING, NOT_SERVING or UNKNOWN."""
        response = await self._unary(
            health_pb2_grpc.HealthStub(self._channel).Check, health_pb2.HealthCheckRequest()
        )
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def _unary(self, method: Any, request: Any, timeout_s: float = CALL_S) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    async def _messages(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        finally:
            call.cancel()

    @property
    def _stub(self) -> Any:
        return self._stub_class(self._channel)

    async def capabilities(self) -> Capabilities:
        """What the agent is and can do."""
        response = await self._unary(self._stub.GetCapabilities, common_pb2.GetCapabilitiesRequest())
        return convert.capabilities_from_proto(response.capabilities)


class ReceiverClient(_Client):
    """Calls to a receiver agent."""

    _stub_class = receiver_pb2_grpc.ReceiverServiceStub

    async def push(self, frames: Sequence[bytes]) -> AsyncIterator[PushStatus | int]:
        """Send a transfer and yield the receiver's statuses, and frame numbers as they leave.

        Waits for `accepted` before the second frame and continues where the receiver says.
        """
        method = self._channel.stream_stream(
            "/kvlink.v1.ReceiverService/PushCache",
            request_serializer=None,
            response_deserializer=receiver_pb2.PushCacheResponse.FromString,
        )
        call = method(timeout=CALL_S)
        writer: asyncio.Task[None] | None = None
        sent: asyncio.Queue[int] = asyncio.Queue()
        try:
            await call.write(frames[0])
            first = await call.read()
            if first is grpc.aio.EOF:
                raise RemoteProtocolError(f"{self.address}: the receiver ended the call before it accepted")
            status = convert.push_status_from_proto(first)
            yield status
            if status.state == "complete":
                return
            writer = asyncio.create_task(self._write(call, frames, status.next_sequence, sent))
            while (message := await call.read()) is not grpc.aio.EOF:
                while not sent.empty():
                    yield sent.get_nowait()
                yield convert.push_status_from_proto(message)
            await writer
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._why(call, error) from error
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: Any, frames: Sequence[bytes], first: int, sent: asyncio.Queue[int]) -> None:
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
        return convert.push_status_from_proto(await self._unary(self._stub.GetTransferStatus, request))

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        request = receiver_pb2.GenerateRequest(
            cache_id=ask.cache_id,
            question=ask.question,
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
        )
        async for message in self._messages(self._stub.Generate(request, timeout=CALL_S)):
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
        await self._unary(self._stub.DeleteCache, receiver_pb2.DeleteCacheRequest(cache_id=cache_id))


class SenderClient(_Client):
    """Calls to a sender agent."""

    _stub_class = sender_pb2_grpc.SenderServiceStub

    async def publish(
        self, text: str, lifetime_s: int = 0, turns: Sequence[tuple[str, str]] = ()
    ) -> Published:
        request = sender_pb2.PublishContextRequest(
            text=text,
            lifetime_s=lifetime_s,
            earlier_turns=[sender_pb2.Turn(role=role, content=content) for role, content in turns],
        )
        done = await self._unary(self._stub.PublishContext, request)
        return Published(
            done.context_id, done.context_tokens, done.cache_bytes, done.prefill_s, done.lifetime_s
        )

    async def unpublish(self, context_id: str) -> None:
        request = sender_pb2.UnpublishContextRequest(context_id=context_id)
        await self._unary(self._stub.UnpublishContext, request)

    async def fetch(
        self, context_id: str, question: str, recipe: str = "", wish: Wish | None = None
    ) -> AsyncIterator[bytes]:
        """The frames of a published context, reduced for `question`."""
        method = self._channel.unary_stream(
            "/kvlink.v1.SenderService/FetchCache",
            request_serializer=sender_pb2.FetchCacheRequest.SerializeToString,
            response_deserializer=None,
        )
        request = sender_pb2.FetchCacheRequest(
            context_id=context_id, question=question, recipe=recipe, **_wished(wish or Wish())
        )
        async for frame in self._messages(method(request, timeout=CALL_S)):
            yield frame

    async def deliver(self, delivery: Delivery) -> AsyncIterator[Progress]:
        request = sender_pb2.DeliverCacheRequest(
            question=delivery.question,
            recipe=delivery.recipe,
            **_wished(delivery.wish),
            receiver=delivery.receiver,
            answer_here=delivery.answer_here,
            explain=delivery.explain,
        )
        if delivery.context_id:
            request.context_id = delivery.context_id
        else:
            request.text = delivery.text
        async for message in self._messages(self._stub.DeliverCache(request, timeout=CALL_S)):
            yield Progress(
                message.sent_bytes,
                message.total_bytes,
                message.done,
                message.cache_id,
                message.sender_answer,
                convert.receipt_from_proto(message.receipt),
                convert.explanation_from_proto(message.explanation),
            )
