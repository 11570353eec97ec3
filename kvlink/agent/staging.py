"""Transfers on disk: what has arrived, or is to leave, survives a restart of its agent.

A folder holds two files for each transfer: `ID.kvl`, its frames as in any `.kvl` file, and `ID.json`,
what the agent wrote down about it. Files are readable by their owner only. A frame counts as kept when
`add` has returned; a tail that was cut by a crash is dropped when the file is read again.

Does not know: what a frame says, sockets. Place on the path: beside the receiver's intake and the
sender's packed transfers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kvlink.errors import BusyError, ConfigError, DataError, LimitError, ProtocolError
from kvlink.wire.file import framed, read_frames, write_frames


class Staging:
    """A folder of transfers, at most `max_bytes` of them. Raises ConfigError where it cannot be used."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"cannot stage transfers in {folder}: {error.strerror}") from error
        self._bytes = sum(path.stat().st_size for path in folder.glob("*.kvl"))

    def __iter__(self) -> Iterator[bytes]:
        """Ids of the transfers that are here."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError):
                yield bytes.fromhex(path.stem)

    def begin(self, key: bytes, notes: Mapping[str, Any]) -> Staged:
        """Start a transfer's files anew. Raises BusyError where the folder is full."""
        if self._bytes >= self.max_bytes:
            raise BusyError(f"at most {self.max_bytes} bytes are staged on disk; try again later", 5.0)
        self.forget(key)
        try:
            self.note(key, notes)
            with _private(self._path(key, "kvl")) as out:
                self._bytes += write_frames((), out)
            return Staged(self, key)
        except OSError as error:
            self.forget(key)
            raise BusyError(
                f"a transfer cannot be kept on disk: {error.strerror}; try again later", 5.0
            ) from error

    def resume(self, key: bytes) -> tuple[Staged, list[bytes]] | None:
        """A transfer's file and the whole frames in it; what a crash left behind them is cut off.

        None where there is no such transfer.
        """
        path = self._path(key, "kvl")
        if not path.exists():
            return None
        frames: list[bytes] = []
        with path.open("rb") as source, contextlib.suppress(DataError, ProtocolError, LimitError):
            frames.extend(read_frames(source))
        whole = 12 + sum(4 + len(frame) for frame in frames)
        self._bytes -= path.stat().st_size - whole
        os.truncate(path, whole)
        return Staged(self, key), frames

    def first_frame(self, key: bytes) -> bytes:
        """The first frame of a transfer, without reading the others; empty where there is none."""
        try:
            with self._path(key, "kvl").open("rb") as source:
                return next(read_frames(source), b"")
        except (OSError, DataError, ProtocolError, LimitError):
            return b""

    def notes(self, key: bytes) -> dict[str, Any]:
        """What was written down about a transfer; empty where nothing can be read."""
        try:
            found = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, key: bytes, notes: Mapping[str, Any]) -> None:
        """Write down `notes` about a transfer in place of the earlier ones, all or nothing."""
        path = self._path(key, "json")
        fresh = path.with_suffix(".new")
        with _private(fresh) as out:
            out.write(json.dumps({"at": time.time(), **notes}).encode())
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)

    def keep(self, key: bytes, frames: Iterable[bytes], notes: Mapping[str, Any]) -> None:
        """Write a whole transfer."""
        staged = self.begin(key, notes)
        staged.add(*frames)
        staged.close()

    def forget(self, key: bytes) -> None:
        """Remove a transfer's files. Not there is fine."""
        with contextlib.suppress(OSError):
            self._bytes -= self._path(key, "kvl").stat().st_size
        for kind in ("kvl", "json", "new"):
            with contextlib.suppress(OSError):
                self._path(key, kind).unlink()

    def grown(self, nbytes: int) -> None:
        self._bytes += nbytes

    def _path(self, key: bytes, kind: str) -> Path:
        return self.folder / f"{key.hex()}.{kind}"


class Staged:
    """The open file of one transfer."""

    def __init__(self, staging: Staging, key: bytes) -> None:
        self._staging = staging
        self._out = (staging.folder / f"{key.hex()}.kvl").open("ab", buffering=0)
        self._whole = self._out.tell()

    def add(self, *frames: bytes) -> None:
        """Append frames and wait until the disk has them: all of them, or BusyError and none."""
        data = b"".join(map(framed, frames))
        try:
            left = memoryview(data)
            while left:
                left = left[self._out.write(left) :]
            os.fdatasync(self._out.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._out.fileno(), self._whole)
            raise BusyError(
                f"frames cannot be kept on disk: {error.strerror}; try again later", 5.0
            ) from error
        self._whole += len(data)
        self._staging.grown(len(data))

    def close(self) -> None:
        self._out.close()


def _private(path: Path) -> BinaryIO:
    """A new file that only its owner can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
