"""A TCP relay between a client and a server, for tests: it records, corrupts and cuts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any


class Relay:
    """Forwards connections to `port`.

    `seen`: bytes that went to the server. `change(data, offset)`: what to forward instead.
    `cut_after`: bytes towards the server after which the connection is cut, once or (`cut_always`)
    whenever more come.
    """

    def __init__(
        self,
        port: int,
        change: Callable[[bytes, int], bytes] | None = None,
        cut_after: int = 0,
        cut_always: bool = False,
    ) -> None:
        self._port = port
        self._change = change
        self._cut_after = cut_after
        self._cut_always = cut_always
        self.seen = bytearray()
        self.cuts = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def forward() -> None:
            while data := await reader.read(4096):
                offset = len(self.seen)
                self.seen += data
                due = self._cut_after and len(self.seen) >= self._cut_after
                if due and (self._cut_always or not self.cuts):
                    self.cuts += 1
                    writer.transport.abort()
                    return
                up_writer.write(self._change(data, offset) if self._change else data)
                await up_writer.drain()

        async def back() -> None:
            while data := await up_reader.read(65536):
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(forward()), asyncio.create_task(back())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
