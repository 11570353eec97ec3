"""A TCP relay between a client and a server, for tests: it records, shapes, stalls, corrupts and cuts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any


class Relay:
    """Forwards connections to `port`.

    `seen`, `came`: bytes that went to the server, and came from it. `change(data, offset)`: what to
    forward to the server instead. `cut_after`, `cut_back_after`: bytes towards the server, or from it,
    after which the connection is cut, once or (`cut_always`) whenever more come. `stall_after`: bytes
    towards the server after which nothing is forwarded in either direction, until `go()`; connections
    stay open. `rate_bps`, `rate_back_bps`: of the way to the server, and of the way from it.
    """

    def __init__(
        self,
        port: int,
        change: Callable[[bytes, int], bytes] | None = None,
        cut_after: int = 0,
        cut_back_after: int = 0,
        cut_always: bool = False,
        stall_after: int = 0,
        rate_bps: float = 0.0,
        rate_back_bps: float = 0.0,
    ) -> None:
        self._port = port
        self._change = change
        self._cut_after = cut_after
        self._cut_back_after = cut_back_after
        self._cut_always = cut_always
        self._stall_after = stall_after
        self._rate_bps = rate_bps
        self._rate_back_bps = rate_back_bps
        self._going = asyncio.Event()
        self._going.set()
        self._loop = asyncio.get_running_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self.seen = bytearray()
        self.came = bytearray()
        self.cuts = 0
        self.port = 0

    def go(self) -> None:
        """End the stall."""
        self._stall_after = 0
        self._going.set()

    def stall(self) -> None:
        """Forward nothing any more, in either direction."""
        self._going.clear()

    def cut(self) -> None:
        """Cut all connections, from any thread."""
        self._loop.call_soon_threadsafe(lambda: [w.transport.abort() for w in list(self._writers)])

    def _due(self, after: int, count: int) -> bool:
        if not after or count < after or (self.cuts and not self._cut_always):
            return False
        self.cuts += 1
        return True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # the server is gone
            writer.transport.abort()
            return
        self._writers.add(writer)

        async def forward() -> None:
            while data := await reader.read(4096):
                offset = len(self.seen)
                self.seen += data
                if self._stall_after and len(self.seen) >= self._stall_after:
                    self._going.clear()
                await self._going.wait()
                if self._due(self._cut_after, len(self.seen)):
                    writer.transport.abort()
                    return
                if self._rate_bps:
                    await asyncio.sleep(8 * len(data) / self._rate_bps)
                up_writer.write(self._change(data, offset) if self._change else data)
                await up_writer.drain()

        async def back() -> None:
            while data := await up_reader.read(4096 if self._rate_back_bps else 65536):
                self.came += data
                await self._going.wait()
                if self._due(self._cut_back_after, len(self.came)):
                    writer.transport.abort()
                    return
                if self._rate_back_bps:
                    await asyncio.sleep(8 * len(data) / self._rate_back_bps)
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(forward()), asyncio.create_task(back())]
        with contextlib.suppress(asyncio.CancelledError):  # the test is over
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._writers.discard(writer)
        for side in (writer, up_writer):
            side.close()


@asynccontextmanager
async def relay(port: int, **options: Any):
    """A running `Relay`; options as there."""
    made = Relay(port, **options)
    server = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
