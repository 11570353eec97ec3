"""Transfers on disk: what has arrived, or is to leave, survives a restart of its agent.

A folder holds two files for each transfer: `ID.kvl`, its frames as in any `.kvl` file, and `ID.json`,
what the agent wrote down about it. Files are readable by their owner only. A frame counts as kept when
`add` has returned; a tail that was cut by a crash is dropped when the file is read again. A file that
nobody works on may make room for another; whose for whose is `shares`' business.

Does not know: what a frame says, sockets. Place on the path: beside the receiver's intake and the
sender's packed transfers.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvlink.agent.shares import Account, Movable, Shares
from kvlink.errors import BusyError, ConfigError, DataError, KvlinkError, LimitError, ProtocolError
from kvlink.wire.file import framed, read_frames, write_frames

NOBODYS = Account()
_RETRY_S = 5.0
_EMPTY_BYTES = 12
"""Of a file without frames."""


@dataclass(slots=True)
class _File:
    """`at_rest`: nobody reads or writes it. `used_at`: seconds of the wall clock, kept over restarts."""

    account: Account
    nbytes: int
    used_at: float
    at_rest: bool = False


class Staging:
    """A folder of transfers, at most `max_bytes` of them, `max_peer_bytes` for one peer (0: half). For
    several threads. Raises ConfigError where it cannot be used."""

    def __init__(self, folder: Path, max_bytes: int, max_peer_bytes: int = 0) -> None:
        self.folder = folder
        self._shares = Shares("transfer on disk", max_bytes, max_peer_bytes)
        self._lock = threading.RLock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"cannot stage transfers in {folder}: {error.strerror}") from error
        self._files: dict[bytes, _File] = {}
        for path in folder.glob("*.kvl"):
            with contextlib.suppress(ValueError):
                self._find(bytes.fromhex(path.stem))

    def __iter__(self) -> Iterator[bytes]:
        """Ids of the transfers that are here."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError):
                yield bytes.fromhex(path.stem)

    def begin(self, key: bytes, notes: Mapping[str, Any], account: Account = NOBODYS) -> Staged:
        """Start a transfer's files anew. Raises BusyError where there is no room."""
        self.forget(key)
        try:
            with self._lock:
                self._files[key] = _File(account, 0, time.time())
                self.grow(key, _EMPTY_BYTES)
            self.note(key, notes)
            with _private(self._path(key, "kvl")) as out:
                write_frames((), out)
            return Staged(self, key)
        except KvlinkError:
            self.forget(key)
            raise
        except OSError as error:
            self.forget(key)
            raise BusyError(
                f"a transfer cannot be kept on disk: {error.strerror}; try again later", _RETRY_S
            ) from error

    def resume(self, key: bytes) -> tuple[Staged, list[bytes]] | None:
        """A transfer's file and the whole frames in it; what a crash left behind them is cut off.

        None where there is no such transfer. The file stays until it is at `rest` again.
        """
        path = self._path(key, "kvl")
        with self._lock:
            found = self._find(key)
            if found is None:
                return None
            found.at_rest = False
        frames: list[bytes] = []
        try:
            with path.open("rb") as source, contextlib.suppress(DataError, ProtocolError, LimitError):
                frames.extend(read_frames(source))
            found.nbytes = _EMPTY_BYTES + sum(4 + len(frame) for frame in frames)
            os.truncate(path, found.nbytes)
            return Staged(self, key), frames
        except FileNotFoundError:  # given up meanwhile
            return None

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
        path, found = self._path(key, "json"), self._files.get(key)
        fresh = path.with_suffix(".new")
        whose = [found.account.peer, found.account.asker] if found else ["", ""]
        with _private(fresh) as out:
            out.write(json.dumps({"at": time.time(), "account": whose, **notes}).encode())
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)

    def keep(
        self, key: bytes, frames: Iterable[bytes], notes: Mapping[str, Any], account: Account = NOBODYS
    ) -> None:
        """Write a whole transfer, or nothing. Raises BusyError, LimitError."""
        staged = self.begin(key, notes, account)
        try:
            staged.add(*frames)
        except KvlinkError:
            self.forget(key)
            raise
        finally:
            staged.close()
        self.rest(key)

    def rest(self, key: bytes) -> None:
        """Nobody works on a transfer's file for now: it may make room for another. Not there is fine."""
        with self._lock:
            if found := self._files.get(key):
                found.at_rest, found.used_at = True, time.time()

    def forget(self, key: bytes) -> None:
        """Remove a transfer's files. Not there is fine."""
        with self._lock:
            self._files.pop(key, None)
            for kind in ("kvl", "json", "new"):
                with contextlib.suppress(OSError):
                    self._path(key, kind).unlink()

    def grow(self, key: bytes, nbytes: int) -> None:
        """Make room for more of a transfer; what is not here any more counts for nobody.

        Raises LimitError where it can never be kept, BusyError where there is no room now.
        """
        with self._lock:
            mine = self._files.get(key)
            if mine is None:
                return
            self._shares.check(mine.nbytes + nbytes)
            taken, movable = Counter[Account](), []
            for other, file in self._files.items():
                taken[file.account] += file.nbytes
                if file.at_rest:
                    movable.append(Movable(other.hex(), file.account, file.nbytes, file.used_at))
            for name in self._shares.make_room(nbytes, mine.account, movable, taken, _RETRY_S):
                self.forget(bytes.fromhex(name))
            mine.nbytes += nbytes

    def shrink(self, key: bytes, nbytes: int) -> None:
        """The counterpart of `grow`, where the disk did not take it."""
        with self._lock:
            if found := self._files.get(key):
                found.nbytes -= nbytes

    def _find(self, key: bytes) -> _File | None:
        """A transfer's file; one that an earlier life has left is at rest until somebody works on it."""
        path = self._path(key, "kvl")
        if not path.exists():
            return None
        if key not in self._files:
            notes = self.notes(key)
            at = notes.get("at")
            used_at = float(at) if isinstance(at, (int, float)) else 0.0
            self._files[key] = _File(
                _account(notes.get("account")), path.stat().st_size, used_at, at_rest=True
            )
        return self._files[key]

    def _path(self, key: bytes, kind: str) -> Path:
        return self.folder / f"{key.hex()}.{kind}"


class Staged:
    """The open file of one transfer."""

    def __init__(self, staging: Staging, key: bytes) -> None:
        self._staging, self._key = staging, key
        path = staging.folder / f"{key.hex()}.kvl"
        # Without O_CREAT: what was given up meanwhile is not made anew.
        self._out = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
        self._whole = self._out.tell()

    def add(self, *frames: bytes) -> None:
        """Append frames and wait until the disk has them: all of them, or BusyError and none.

        Raises LimitError where there can never be room.
        """
        data = b"".join(map(framed, frames))
        self._staging.grow(self._key, len(data))
        try:
            left = memoryview(data)
            while left:
                left = left[self._out.write(left) :]
            os.fdatasync(self._out.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._out.fileno(), self._whole)
            self._staging.shrink(self._key, len(data))
            raise BusyError(
                f"frames cannot be kept on disk: {error.strerror}; try again later", _RETRY_S
            ) from error
        self._whole += len(data)

    def close(self) -> None:
        self._out.close()


def _account(noted: Any) -> Account:
    """Whose a transfer is, as it was noted; nobody's where nothing can be read."""
    if isinstance(noted, list) and len(noted) == 2 and all(isinstance(name, str) for name in noted):
        return Account(*noted)
    return NOBODYS


def _private(path: Path) -> BinaryIO:
    """A new file that only its owner can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
