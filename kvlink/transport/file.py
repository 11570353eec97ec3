"""A `.kvl` file as a link: a transfer that is pushed to it is kept, and pulled from it it is checked as from any sender.

Does not know: what a frame says. Place on the path: in place of a connection.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import BinaryIO

from kvlink.errors import InputError, KvlinkError
from kvlink.transport.api import Fetch, FrameSource, PushStatus
from kvlink.transport.exchange import Listed
from kvlink.wire.file import framed, read_frames, write_frames
from kvlink.wire.session import ReceiveSession


class FileLink:
    """`file`: open for what is done with it, at its beginning. `name`: for errors, and of what was kept."""

    def __init__(self, file: BinaryIO, name: str = "file") -> None:
        self._file, self.address = file, name

    async def push(
        self,
        frames: Sequence[bytes] | FrameSource,
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
        *,
        fresh: bool = False,
    ) -> AsyncGenerator[PushStatus | int, None]:
        """Write a transfer; complete under the file's name. Who may read a file is the file system's business."""
        source: FrameSource = Listed(frames) if isinstance(frames, Sequence) else frames
        write_frames((), self._file)
        number = 0
        yield PushStatus("accepted", 1)
        while (frame := await source.frame(number)) is not None:
            self._file.write(framed(frame))
            yield number
            number += 1
        yield PushStatus("complete", number, self.address)

    async def fetch(
        self, fetch: Fetch, asked_by: str = "", *, early: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """The frames of the file's transfer. Raises InputError where another one is asked for: it was packed before."""
        if fetch != Fetch(fetch.context_id):
            raise InputError(f"{self.address}: a file has one transfer as it was packed, and packs no other")
        session = ReceiveSession(keep=False)
        try:
            for frame in read_frames(self._file):
                session.receive(frame)
                yield frame
            session.close()
        except KvlinkError as error:
            raise type(error)(f"{self.address}: {error}") from None
