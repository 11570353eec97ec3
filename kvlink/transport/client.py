"""Clients of the two services: the calls in the package's own values and errors.

Does not know: models, codecs, what a frame says. Place on the path: how one agent, or the
command line, reaches another.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import grpc
from blake3 import blake3

from kvlink.errors import KvlinkError, RemoteProtocolError
from kvlink.payload import TurnLike, turns_from
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery, Fetch, FrameSource, Piece, Progress, Published, PushStatus
from kvlink.transport.channel import QUICK_S, Client, error_of
from kvlink.transport.exchange import Pulling, pull, push
from kvlink.transport.expected import Answered, Delivering
from kvlink.v1 import receiver_pb2, sender_pb2, wire_pb2
from kvlink.wire.messages import TRANSFER_ID_BYTES

PIECE_BYTES = 512 * 1024
"""Of a profile that is sent ahead, in one message."""


class _PushStream:
    """A push over one call."""

    def __init__(self, call: Any, statuses: AsyncGenerator[PushStatus, None]) -> None:
        self._call, self._statuses = call, statuses

    async def write(self, frame: bytes) -> bool:
        try:
            await self._call.write(receiver_pb2.PushCacheRequest(frame=frame))
        except (grpc.RpcError, asyncio.InvalidStateError):
            return False
        return True

    async def done_writing(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    def statuses(self) -> AsyncGenerator[PushStatus, None]:
        return self._statuses

    def cancel(self) -> None:
        self._call.cancel()


class ReceiverClient(Client):
    """Calls to a receiver agent."""

    _service = receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"]

    async def push(
        self,
        frames: Sequence[bytes] | FrameSource,
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
        *,
        fresh: bool = False,
    ) -> AsyncGenerator[PushStatus | int, None]:
        """Send a transfer and yield the receiver's statuses, and frame numbers as they leave.

        Waits for `accepted` before the second frame and continues where the receiver says. `readers`:
        peers that may use the cache beside this one; `asked_by`: one that may remove it too. `fresh`:
        nothing of this transfer was ever sent, so that nobody can have it. Raises RemoteProtocolError where
        the receiver says what cannot be.
        """
        call = self._method("PushCache")(
            timeout=timeout_s or self.timeout_s, metadata=self._shown(readers, asked_by)
        )
        stream = _PushStream(call, self._statuses(call))
        async with contextlib.aclosing(push(stream, frames, self.address, fresh=fresh)) as told:
            async for item in told:
                yield item

    async def _statuses(self, call: Any) -> AsyncGenerator[PushStatus, None]:
        """What the receiver says, to the end of the call."""
        try:
            while (data := await self._read(call)) is not grpc.aio.EOF:
                try:
                    status = convert.push_status_from_proto(self._understood("PushCache", data))
                except RemoteProtocolError as error:
                    raise RemoteProtocolError(f"{self.address}: {error}") from None
                yield status
            if await call.code() is not grpc.StatusCode.OK:
                raise await self._told(await error_of(call))
        except grpc.RpcError as error:
            raise await self._told(error) from error

    async def transfer_status(self, transfer_id: bytes) -> PushStatus:
        request = receiver_pb2.GetTransferStatusRequest(transfer_id=transfer_id)
        return convert.push_status_from_proto(await self._unary("GetTransferStatus", request, QUICK_S))

    async def cancel(self, transfer_id: bytes) -> None:
        """Give up a transfer; a receiver that cannot be reached finds out by its own clock."""
        request = receiver_pb2.CancelTransferRequest(transfer_id=transfer_id)
        await self._tell("CancelTransfer", request)

    async def generate(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        request = convert.request(
            receiver_pb2.GenerateRequest,
            **({"handle": ask.handle} if ask.handle else {"cache_id": ask.cache_id}),
            recipe=ask.recipe,
            target=convert.target_to_proto(ask.target),
            question=ask.question,
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
        )
        expected = Answered(ask)
        async with contextlib.aclosing(self._messages("Generate", request)) as messages:
            async for message in messages:
                if message.token_ids or message.done:
                    receipt = convert.receipt_from_proto(message.receipt)
                    piece = Piece(
                        message.text, tuple(message.token_ids), message.done, receipt, message.cache_id
                    )
                    expected.told(piece)
                    yield piece
        expected.end()

    async def put_profile(self, data: bytes) -> bytes:
        """Send a profile ahead; its digest. Raises IdentityError where it is another model's, LimitError."""
        digest, kind = blake3(data).digest(length=16), receiver_pb2.PutProfileRequest

        async def parts() -> AsyncGenerator[Any, None]:
            yield kind(start=receiver_pb2.PutProfileStart(digest=digest, total_bytes=len(data)))
            for at in range(0, len(data), PIECE_BYTES):
                yield kind(data=data[at : at + PIECE_BYTES])

        done = await self._unary("PutProfile", parts())
        if done.digest != digest:
            raise RemoteProtocolError(
                f"{self.address}: took the profile {digest.hex()} for {done.digest.hex()}"
            )
        return digest

    async def delete_cache(self, cache_id: str) -> None:
        request = convert.request(receiver_pb2.DeleteCacheRequest, cache_id=cache_id)
        await self._unary("DeleteCache", request, QUICK_S)


class SenderClient(Client):
    """Calls to a sender agent."""

    _service = sender_pb2.DESCRIPTOR.services_by_name["SenderService"]

    async def publish(
        self,
        text: str,
        lifetime_s: int = 0,
        turns: Iterable[TurnLike] = (),
        readers: Sequence[str] = (),
        extends: str = "",
    ) -> Published:
        """Let the sender read a text and hold it; `readers` may use it beside this peer.

        `extends`: the id of a context that is held there: the text goes behind it, and alone is read.
        """
        request = convert.request(
            sender_pb2.PublishContextRequest,
            text=text,
            lifetime_s=lifetime_s,
            earlier_turns=[
                convert.request(wire_pb2.Turn, role=turn.role, content=turn.content)
                for turn in turns_from(turns)
            ],
            readers=readers,
            extends=extends,
        )
        done = await self._unary("PublishContext", request)
        return Published(
            done.context_id, done.context_tokens, done.cache_bytes, done.prefill_s, done.lifetime_s
        )

    async def unpublish(self, context_id: str) -> None:
        request = convert.request(sender_pb2.UnpublishContextRequest, context_id=context_id)
        await self._unary("UnpublishContext", request, QUICK_S)

    async def fetch(
        self, fetch: Fetch, asked_by: str = "", *, early: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """See `PullLink.fetch`. A stream that breaks goes on at the next frame."""

        async def on_another(pulling: Pulling) -> AsyncGenerator[bytes, None]:
            # What is still under way on this connection would hold the text up.
            async with (
                copy.copy(self) as client,
                contextlib.aclosing(client._frames(pulling, asked_by)) as found,
            ):
                async for frame in found:
                    yield frame

        pulled = pull(lambda p: self._frames(p, asked_by), on_another, fetch, self.address, early=early)
        async with contextlib.aclosing(pulled) as frames:
            async for frame in frames:
                yield frame

    async def _frames(self, pulling: Pulling, asked_by: str) -> AsyncGenerator[bytes, None]:
        """The frames as they come, from the next one on where a stream breaks."""

        async def frames() -> AsyncGenerator[bytes, None]:
            request = convert.fetch_to_proto(pulling.request)
            calls = self._messages("FetchCache", request, bulk=True, asked_by=asked_by)
            async with contextlib.aclosing(calls) as messages:
                async for message in messages:
                    if message.WhichOneof("message") != "heartbeat":
                        yield message.frame

        async with contextlib.aclosing(self._again(frames)) as found:
            async for frame in found:
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
                await self._tell("CancelDelivery", request)

    async def _deliver(self, delivery: Delivery) -> AsyncGenerator[Progress, None]:
        request = convert.request(
            sender_pb2.DeliverCacheRequest,
            question=delivery.question,
            recipe=delivery.recipe,
            target=convert.target_to_proto(delivery.target),
            receiver=delivery.receiver,
            answer_here=delivery.answer_here,
            explain=delivery.explain,
            delivery_id=delivery.delivery_id,
            base_digest=delivery.base_digest,
            **({"context_id": delivery.context_id} if delivery.context_id else {"text": delivery.text}),
        )
        expected = Delivering()
        async with contextlib.aclosing(self._messages("DeliverCache", request)) as messages:
            async for message in messages:
                if not message.total_bytes:
                    continue  # a sign of life
                progress = Progress(
                    message.sent_bytes,
                    message.total_bytes,
                    message.done,
                    message.cache_id,
                    message.sender_answer,
                    convert.receipt_from_proto(message.receipt),
                    convert.explanation_from_proto(message.explanation),
                )
                expected.told(progress)
                yield progress
        expected.end()
