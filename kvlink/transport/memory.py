"""Links within a process: an agent's handler is called as it is, without a socket.

For agents that share a process, and for whoever wants the protocol without what carries it. What a handler
raises reaches the other end as it is.

Does not know: models, what a frame says. Place on the path: in place of gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from blake3 import blake3

from kvlink.receipt import Capabilities
from kvlink.transport.api import (
    NOBODY,
    Caller,
    Fetch,
    FrameSource,
    PushStatus,
    ReceiverHandler,
    SenderHandler,
)
from kvlink.transport.exchange import Pulling, pull, push
from kvlink.transport.sockets import SocketCount

_WAITING_FRAMES = 2
"""Written and not yet taken: a writer waits for its receiver."""

H = TypeVar("H", ReceiverHandler, SenderHandler)


class MemoryLink(Generic[H]):
    """A way to a handler in this process, on behalf of `caller`."""

    def __init__(self, handler: H, caller: Caller = NOBODY, address: str = "memory") -> None:
        self._handler: H = handler
        self._caller, self.address = caller, address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    async def capabilities(self) -> Capabilities:
        return self._handler.capabilities()


class ReceiverLink(MemoryLink[ReceiverHandler]):
    """A `PushLink` to a receiver in this process."""

    async def push(
        self,
        frames: Sequence[bytes] | FrameSource,
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
        *,
        fresh: bool = False,
    ) -> AsyncGenerator[PushStatus | int, None]:
        caller = replace(
            self._caller, readers=tuple(readers), asked_by=asked_by, remaining_s=timeout_s or None
        )
        stream = self._stream(caller)
        async with aclosing(push(stream, frames, self.address, fresh=fresh)) as told:
            async for item in told:
                yield item

    def _stream(self, caller: Caller) -> MemoryStream:
        return MemoryStream(self._handler, caller)

    async def put_profile(self, data: bytes) -> bytes:
        async def pieces() -> AsyncIterator[bytes]:
            yield data

        digest = blake3(data).digest(length=16)
        await self._handler.put_profile(digest, len(data), pieces(), self._caller)
        return digest

    async def cancel(self, transfer_id: bytes) -> None:
        await self._handler.cancel_transfer(transfer_id, self._caller)

    def socket_count(self) -> SocketCount | None:
        return None


class SenderLink(MemoryLink[SenderHandler]):
    """A `PullLink` to a sender in this process."""

    async def fetch(
        self, fetch: Fetch, asked_by: str = "", *, early: bool = True
    ) -> AsyncGenerator[bytes, None]:
        caller = replace(self._caller, asked_by=asked_by)

        def frames(pulling: Pulling) -> AsyncGenerator[bytes, None]:
            return self._handler.fetch_cache(pulling.request, caller)  # type: ignore[return-value]

        async with aclosing(pull(frames, frames, fetch, self.address, early=early)) as found:
            async for frame in found:
                yield frame


class MemoryStream:
    """A push stream into a handler."""

    def __init__(self, handler: ReceiverHandler, caller: Caller) -> None:
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING_FRAMES)
        self._statuses = handler.push_cache(self._taken(), caller)

    async def _taken(self) -> AsyncIterator[bytes]:
        while (frame := await self._frames.get()) is not None:
            yield frame

    async def write(self, frame: bytes) -> bool:
        await self._frames.put(frame)
        return True

    async def done_writing(self) -> None:
        await self._frames.put(None)

    async def statuses(self) -> AsyncIterator[PushStatus]:
        async with aclosing(self._statuses) as statuses:  # type: ignore[type-var]
            async for status in statuses:
                yield status

    def cancel(self) -> None:
        """The handler's stream ends here, what was not taken of it is gone."""
        while not self._frames.empty():
            self._frames.get_nowait()
        self._frames.put_nowait(None)
