"""The two exchanges of a link, whatever carries it: a push with its statuses, a pull with its checks.

    frames ─▶ stream.write ─▶ receiver ─▶ stream.statuses ─▶ what can be said now? ─▶ whoever pushes
    sender ─▶ frame ─▶ checks, deadline ─▶ whoever pulls

Does not know: sockets, processes. Place on the path: inside every link.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from kvlink.errors import DeadlineError, KvlinkError, RemoteProtocolError
from kvlink.recipe import Target
from kvlink.transport.api import Fetch, FrameSource, PushStatus
from kvlink.transport.expected import Pushing
from kvlink.wire.messages import TRANSFER_ID_BYTES
from kvlink.wire.session import ReceiveSession


class PushStream(Protocol):
    """One stream to a receiver: frames there, statuses back."""

    async def write(self, frame: bytes) -> bool:
        """Whether the stream takes frames; where it is over its statuses say why."""
        ...

    async def done_writing(self) -> None: ...

    def statuses(self) -> AsyncIterator[PushStatus]:
        """What the receiver says, to the end. Raises what ended the stream before that."""
        ...

    def cancel(self) -> None: ...


class Listed:
    """A list of frames as a source."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames = frames
        self.count = len(frames)

    async def frame(self, number: int) -> bytes | None:
        return self._frames[number] if number < self.count else None


async def push(
    stream: PushStream, frames: Sequence[bytes] | FrameSource, peer: str, *, fresh: bool = False
) -> AsyncGenerator[PushStatus | int, None]:
    """Push frames through a stream, which is cancelled in the end; see `PushLink.push`. `peer`: for errors."""
    source: FrameSource = Listed(frames) if isinstance(frames, Sequence) else frames
    first = await source.frame(0) or b""
    expected = Pushing(lambda: source.count, fresh, _names_deadline(first))
    told: asyncio.Queue[PushStatus | int | Exception | None] = asyncio.Queue()
    writer: asyncio.Task[None] | None = None
    reader = asyncio.create_task(_listen(stream, source, expected, peer, told))
    try:
        await stream.write(first)
        while (item := await told.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            if writer is None and isinstance(item, PushStatus) and item.state == "accepted":
                writer = asyncio.create_task(_write(stream, source, expected, peer, told))
    finally:
        stream.cancel()
        tasks = [task for task in (reader, writer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(
    stream: PushStream, source: FrameSource, expected: Pushing, peer: str, told: asyncio.Queue[Any]
) -> None:
    """Put what the receiver says into `told`, then None, or the error that ended the stream."""
    try:
        async for status in stream.statuses():
            if status.state == "complete" and source.count is None and expected.begin_at:
                await source.frame(expected.begun + 1)  # the last frame is known as such when none follows
            try:
                news = expected.told(status)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{peer}: {error}") from None
            if news:
                told.put_nowait(status)
        if not expected.answered:
            raise RemoteProtocolError(f"{peer}: the receiver ended the call before it accepted")
        told.put_nowait(None)
    except Exception as error:  # whatever it is belongs to the one who pushes
        told.put_nowait(error)


async def _write(
    stream: PushStream, source: FrameSource, expected: Pushing, peer: str, told: asyncio.Queue[Any]
) -> None:
    """Write frames from where the receiver is, as they are made. What ends the making goes into `told`."""
    number = expected.begin_at
    while True:
        try:
            frame = await source.frame(number)
        except Exception as error:  # whatever it is belongs to the one who pushes
            told.put_nowait(error)
            return
        if frame is None:
            break
        expected.begun = number
        if not await stream.write(frame):
            return
        told.put_nowait(number)
        number += 1
    if number > (source.count or 0):
        wanted = f"the receiver wants frame {number} of a transfer of {source.count}"
        told.put_nowait(RemoteProtocolError(f"{peer}: {wanted}"))
    await stream.done_writing()


Frames = Callable[["Pulling"], AsyncGenerator[bytes, None]]
"""Frames as they come from a sender, for what a `Pulling` asks for next."""


async def pull(
    frames: Frames, instead: Frames, fetch: Fetch, peer: str, *, early: bool = True
) -> AsyncGenerator[bytes, None]:
    """The frames of a transfer, checked; see `PullLink.fetch`. `instead`: of the text, where a deadline has passed
    with nothing to hand out. `peer`: for errors."""
    handed = False
    try:
        async with aclosing(Pulling(fetch, peer).over(frames, early)) as found:
            async for frame in found:
                handed = True
                yield frame
        return
    except DeadlineError:
        if handed or not (early and fetch.target.allow_text):
            raise
    as_text = replace(fetch, recipe="text", target=Target(), transfer_id=b"", base_digest=b"")
    async with aclosing(Pulling(as_text, peer).over(instead, early)) as found:
        async for frame in found:
            yield frame


class Pulling:
    """A transfer on its way from a sender, each frame checked as a receiver would before it is handed out.

    `request`: what is asked for next: with an id, from the next frame on.
    """

    def __init__(self, fetch: Fetch, peer: str) -> None:
        """`peer`: for errors."""
        self._session, self._peer, self._bytes = ReceiveSession(keep=False), peer, 0
        key = fetch.transfer_id or secrets.token_bytes(TRANSFER_ID_BYTES)
        self.request = replace(fetch, transfer_id=key, next_sequence=0)

    async def over(self, frames: Frames, early: bool) -> AsyncGenerator[bytes, None]:
        """What comes, checked; with a deadline a segment at a time.

        Raises what a receiving session raises: the first frame that is none ends it, and so does a stream
        without an end; DeadlineError where no segment has closed by the deadline.
        """
        session, open_segment = self._session, list[bytes]()
        began, deadline_s = time.monotonic(), self.request.target.deadline_s if early else 0.0
        async with aclosing(frames(self)) as found:
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
                        f"{self._peer}: the deadline of {deadline_s:g} s has passed: {session.next_sequence} "
                        f"frames of {self._bytes:,} bytes came, no segment has closed"
                    ) from None
                closed = len(session.closed)
                self._take(frame)
                open_segment.append(frame)
                if not deadline_s or len(session.closed) > closed or session.state == "done":
                    for ready in open_segment:
                        yield ready
                    open_segment.clear()
        session.close()

    def _take(self, frame: bytes) -> None:
        """Raises what a receiving session raises, and RemoteProtocolError for a transfer that was not asked for."""
        budget, self._bytes = self.request.target.budget_bytes, self._bytes + len(frame)
        try:
            if budget and self._bytes > budget:
                raise RemoteProtocolError("the transfer has more bytes than the budget that was asked for")
            self._session.receive(frame)
            asked, manifest = self.request.transfer_id, self._session.manifest
            if manifest is not None and manifest.transfer_id != asked:
                raise RemoteProtocolError(
                    f"frame 0: asked for transfer {asked.hex()}, found {manifest.transfer_id.hex()}"
                )
        except KvlinkError as error:
            raise type(error)(f"{self._peer}: {error}") from None
        self.request = replace(self.request, next_sequence=self._session.next_sequence)


def _names_deadline(first_frame: bytes) -> bool:
    """Whether a transfer may end early. What is no manifest the receiver refuses."""
    session = ReceiveSession(keep=False)
    with contextlib.suppress(KvlinkError):
        session.receive(first_frame)
    return bool(session.manifest and session.manifest.deadline_ms)
