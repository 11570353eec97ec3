"""Files that are written: checked before the work, then whole or not there at all.

    Output       the file that a command was asked for: refused at once where it cannot be written
    OutputFolder the same for a folder
    whole_file   a file that is written beside its place and renamed there when it is done

A file that was there before stays as it was until the new one is whole: through a full disk, a quota,
a signal, a power cut. Its permissions and its owner are kept, and a link to it stays a link. What is no
file (`/dev/stdout`, `/dev/null`, a named pipe) is written to as it is.

Does not know: what is in a file. Place on the path: ground floor, over the errors.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvlink.errors import ConfigError

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self|proc/thread-self)/fd/(\d{1,7})")
_MOST_LINKS = 40
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_NO_OUTPUT = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


class Sink:
    """What takes a file's bytes: each `write` takes all it is given, or raises OSError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        return len(data)


@contextlib.contextmanager
def whole_file(path: Path, *, mode: int | None = None, durable: bool = True) -> Iterator[Sink]:
    """A new file that takes the place of `path` when the block ends well; else nothing has happened.

    `mode`: its permissions; None: those of the file that was there, else the usual ones. `durable`:
    wait until the disk has it, so that a power cut too leaves the old file or the new one.
    Raises OSError.
    """
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".kvlink-{secrets.token_hex(8)}.new")
    with signals_raise(), _removed_unless_renamed(beside):
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        try:
            if mode is None:
                _keep_permissions(place, descriptor)
            yield Sink(descriptor)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, place)


@contextlib.contextmanager
def _removed_unless_renamed(beside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Signals that would end the process where it stands raise SystemExit meanwhile, as Ctrl-C raises."""
    mine = threading.current_thread() is threading.main_thread()
    taken = [n for n in _ENDING if mine and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _keep_permissions(place: Path, descriptor: int) -> None:
    try:
        before = os.stat(place)
    except OSError:
        return
    with contextlib.suppress(OSError):  # another's file that may be replaced, but not given away
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, before.st_mode & 0o777)


class Output:
    """A file that a command was asked to write. Made before the work, written after it.

    `reads`: files that the work reads; the output is none of them. Raises ConfigError where the file
    could not be written: no folder, a folder, no right to, one of `reads`.
    """

    def __init__(self, path: Path, reads: Iterable[str | Path] = ()) -> None:
        self.path = path
        try:
            self._descriptor = _descriptor_of(path)
            self._special = self._descriptor is not None or self._check()
            self._check_none_of(reads)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise _cannot_write(path, error) from error

    @property
    def is_standard_output(self) -> bool:
        """Whether what else the command says would end up in the file."""
        return self._descriptor == 1

    @contextlib.contextmanager
    def open(self) -> Iterator[Sink]:
        """Takes the bytes; the file is there when the block has ended well.

        Raises ConfigError where it cannot be finished, BrokenPipeError where nobody reads a pipe.
        """
        try:
            with self._written_directly() if self._special else whole_file(self.path) as sink:
                yield sink
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def write(self, data: bytes) -> int:
        """The whole file at once; returns its bytes. Raises as `open` does."""
        with self.open() as sink:
            return sink.write(data)

    @contextlib.contextmanager
    def _written_directly(self) -> Iterator[Sink]:
        mine = self._descriptor is None
        descriptor = os.open(self.path, os.O_WRONLY) if self._descriptor is None else self._descriptor
        try:
            yield Sink(descriptor)
        finally:
            if mine:
                os.close(descriptor)

    def _check(self) -> bool:
        """Whether the path is there and is no file, but can be written to. Raises OSError, ConfigError."""
        place = Path(os.path.realpath(self.path))
        try:
            found = os.stat(place)
        except FileNotFoundError:
            found = None
        kind = stat.S_IFMT(found.st_mode) if found else stat.S_IFREG
        if kind in _NO_OUTPUT:
            raise ConfigError(f"cannot write {self.path}: it is {_NO_OUTPUT[kind]}")
        if found and not os.access(place, os.W_OK):
            raise ConfigError(f"cannot write {self.path}: it may not be written to")
        if kind != stat.S_IFREG:
            return True
        folder = place.parent
        if not folder.is_dir():
            raise ConfigError(f"cannot write {self.path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write {self.path}: the folder {folder} may not be written to")
        return False

    def _check_none_of(self, reads: Iterable[str | Path]) -> None:
        for other in reads:
            with contextlib.suppress(FileNotFoundError):
                if not self._special and os.path.samefile(self.path, other):
                    raise ConfigError(f"cannot write {self.path}: it is what is read, {other}")


class OutputFolder:
    """A folder that a command was asked to write into; made where it is not there.

    Raises ConfigError where that is not possible.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            what = "it is no folder" if isinstance(error, FileExistsError) else _reason(error)
            raise ConfigError(f"cannot write into {path}: {what}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write into {path}: the folder may not be written to")

    def file(self, name: str) -> Output:
        return Output(self.path / name)


def _descriptor_of(path: Path) -> int | None:
    """The open file of this process that a path such as `/dev/stdout` means, through links too."""
    name = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        match = _DESCRIPTOR.fullmatch(name)
        if name in _STANDARD or match:
            descriptor = int(match[1]) if match else _STANDARD[name]
            os.fstat(descriptor)
            return descriptor
        if not os.path.islink(name):
            break
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def _cannot_write(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot write {path}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
