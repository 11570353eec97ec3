"""Clients of the two services: the calls in the package's own values and errors.

Does not know: models, codecs, what a frame says. Place on the path: how one agent, or the
command line, reaches another.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import grpc
from blake3 import blake3

from kvlink.errors import DeadlineError, KvlinkError, PeerUnavailableError, RemoteProtocolError
from kvlink.payload import TurnLike, turns_from
from kvlink.recipe import Target
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery, Fetch, FrameSource, Piece, Progress, Published, PushStatus
from kvlink.transport.channel import QUICK_S, Client, error_of
from kvlink.transport.expected import Answered, Delivering, Pushing
from kvlink.v1 import receiver_pb2, sender_pb2, wire_pb2
from kvlink.wire.messages import TRANSFER_ID_BYTES
from kvlink.wire.session import ReceiveSession

PIECE_BYTES = 512 * 1024
"""Of a profile that is sent ahead, in one message."""


class _Frames:
    """A list of frames as a source."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames = frames
        self.count = len(frames)

    async def frame(self, number: int) -> bytes | None:
        return self._frames[number] if number < self.count else None


def _names_deadline(first_frame: bytes) -> bool:
    """Whether a transfer may end early. What is no manifest the receiver refuses."""
    session = ReceiveSession(keep=False)
    with contextlib.suppress(KvlinkError):
        session.receive(first_frame)
    return bool(session.manifest and session.manifest.deadline_ms)


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
        source = _Frames(frames) if isinstance(frames, Sequence) else frames
        first = await source.frame(0) or b""
        expected = Pushing(lambda: source.count, fresh, _names_deadline(first))
        told: asyncio.Queue[PushStatus | int | Exception | None] = asyncio.Queue()
        writer: asyncio.Task[None] | None = None
        reader = asyncio.create_task(self._listen(call, expected, told))
        try:
            await call.write(receiver_pb2.PushCacheRequest(frame=first))
            while (item := await told.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if writer is None and isinstance(item, PushStatus) and item.state == "accepted":
                    writer = asyncio.create_task(self._write(call, source, expected, told))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._why(call, error) from error
        finally:
            for task in (reader, writer):
                if task is not None:
                    task.cancel()
            call.cancel()

    async def _listen(
        self, call: Any, expected: Pushing, told: asyncio.Queue[PushStatus | int | Exception | None]
    ) -> None:
        """Put what the receiver says into `told`, then None, or the error that ended the call."""
        try:
            async for status in self._statuses(call, expected):
                await told.put(status)
            await told.put(None)
        except Exception as error:  # whatever it is belongs to the one who pushes
            await told.put(error)

    async def _statuses(self, call: Any, expected: Pushing) -> AsyncGenerator[PushStatus, None]:
        """What the receiver says, to the end of the call. Raises where it ends before it accepts."""
        while (data := await self._read(call)) is not grpc.aio.EOF:
            try:
                status = convert.push_status_from_proto(self._understood("PushCache", data))
                if expected.told(status):
                    yield status
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{self.address}: {error}") from None
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise await self._told(await error_of(call))
        if not expected.answered:
            raise RemoteProtocolError(f"{self.address}: the receiver ended the call before it accepted")

    async def _write(
        self, call: Any, source: FrameSource, expected: Pushing, sent: asyncio.Queue[Any]
    ) -> None:
        """Send frames from where the receiver is, as they are made. What ends the making goes into `sent`."""
        number = expected.begin_at
        try:
            while True:
                try:
                    frame = await source.frame(number)
                except Exception as error:  # whatever it is belongs to the one who pushes
                    return sent.put_nowait(error)
                if frame is None:
                    break
                expected.begun = number
                await call.write(receiver_pb2.PushCacheRequest(frame=frame))
                sent.put_nowait(number)
                number += 1
            if number > (source.count or 0):
                wanted = f"the receiver wants frame {number} of a transfer of {source.count}"
                sent.put_nowait(RemoteProtocolError(f"{self.address}: {wanted}"))
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return None  # the reader sees the call's status and raises it

    async def _why(self, call: Any, error: Exception) -> KvlinkError:
        if isinstance(error, grpc.RpcError):
            return await self._told(error)
        return PeerUnavailableError(f"{self.address}: the call ended: {await call.details()}")

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
        """The frames of a published context, each checked as a receiver would before it is handed out.

        With a deadline they are handed out a segment at a time, and end with the last one that has closed by then;
        where none has, the text comes if that is allowed. `early` False: whoever takes the frames looks at the clock.
        Raises DeadlineError where there is nothing to hand out, and what `_fetch` raises.
        """
        handed = False
        try:
            async with contextlib.aclosing(self._fetch(fetch, asked_by, early)) as frames:
                async for frame in frames:
                    handed = True
                    yield frame
            return
        except DeadlineError:
            if handed or not (early and fetch.target.allow_text):
                raise
        as_text = replace(fetch, recipe="text", target=Target(), transfer_id=b"", base_digest=b"")
        # A connection of its own: what is still under way on this one would hold the text up.
        async with (
            copy.copy(self) as fresh,
            contextlib.aclosing(fresh._fetch(as_text, asked_by, early)) as frames,
        ):
            async for frame in frames:
                yield frame

    async def _fetch(self, fetch: Fetch, asked_by: str, early: bool) -> AsyncGenerator[bytes, None]:
        """The frames of one transfer.

        A stream that breaks goes on at the next frame. Raises what a receiving session raises: the first
        frame that is none ends it, and so does a stream without an end.

        `asked_by`: for whom it is, who must be allowed to use the context too.
        """
        session = ReceiveSession(keep=False)
        request = convert.request(
            sender_pb2.FetchCacheRequest,
            context_id=fetch.context_id,
            question=fetch.question,
            recipe=fetch.recipe,
            transfer_id=fetch.transfer_id or secrets.token_bytes(TRANSFER_ID_BYTES),
            target=convert.target_to_proto(fetch.target),
            base_digest=fetch.base_digest,
        )
        left = fetch.target.budget_bytes or sys.maxsize
        began, open_segment, size = time.monotonic(), list[bytes](), 0
        deadline_s = fetch.target.deadline_s if early else 0.0

        async def frames() -> AsyncGenerator[bytes, None]:
            calls = self._messages("FetchCache", request, bulk=True, asked_by=asked_by)
            async with contextlib.aclosing(calls) as messages:
                async for message in messages:
                    if message.WhichOneof("message") != "heartbeat":
                        yield message.frame

        async with contextlib.aclosing(self._again(frames)) as found:
            while True:
                left_s = began + deadline_s - time.monotonic() if deadline_s else None
                try:
                    frame = await asyncio.wait_for(anext(found), left_s)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    if session.closed:
                        return  # what was handed out is enough
                    raise DeadlineError(
                        f"{self.address}: the deadline of {deadline_s:g} s has passed: {session.next_sequence} "
                        f"frames of {size:,} bytes came, no segment has closed"
                    ) from None
                closed, size = len(session.closed), size + len(frame)
                self._take(session, frame, request.transfer_id, left - size)
                request.next_sequence = session.next_sequence
                open_segment.append(frame)
                if not deadline_s or len(session.closed) > closed or session.state == "done":
                    for ready in open_segment:
                        yield ready
                    open_segment.clear()
        session.close()

    def _take(self, session: ReceiveSession, frame: bytes, transfer_id: bytes, left: int) -> None:
        """Take a frame of a transfer with `left` bytes of its budget after it."""
        try:
            if left < 0:
                raise RemoteProtocolError("the transfer has more bytes than the budget that was asked for")
            session.receive(frame)
            found = session.manifest.transfer_id if session.manifest else b""
            if found != transfer_id:
                raise RemoteProtocolError(
                    f"frame 0: asked for transfer {transfer_id.hex()}, found {found.hex()}"
                )
        except KvlinkError as error:
            raise type(error)(f"{self.address}: {error}") from None

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
