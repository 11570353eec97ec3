"""The `.kvl` file: a transfer as it would travel, kept.

    8 bytes   magic  89 4B 56 4C 0D 0A 1A 0A
    uint32    format version, 1 (little-endian)
    then per frame: uint32 length (little-endian), the frame's bytes

Like PNG's, the magic breaks when a transfer as text changes line ends or drops high bits.

Does not know: what a frame says (the session does). Place on the path: a transport of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Protocol

from kvlink.errors import LimitError, RemoteProtocolError, TruncatedError

MAGIC = b"\x89KVL\r\n\x1a\n"
FORMAT_VERSION = 1


class Writable(Protocol):
    """What takes bytes, all that it is given."""

    def write(self, data: bytes, /) -> int: ...


def write_frames(frames: Iterable[bytes], out: Writable) -> int:
    """Write a whole transfer; returns the bytes written."""
    count = out.write(MAGIC + struct.pack("<I", FORMAT_VERSION))
    for frame in frames:
        count += out.write(framed(frame))
    return count


def framed(frame: bytes) -> bytes:
    """A frame as the file has it: behind its length."""
    return struct.pack("<I", len(frame)) + frame


def read_frames(source: BinaryIO, max_frame_bytes: int = 4_001_024) -> Iterator[bytes]:
    """The frames of a file, one at a time.

    Raises RemoteProtocolError (not a .kvl file, other version), TruncatedError, LimitError.
    """
    head = source.read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise RemoteProtocolError(f"not a .kvl file: expected it to begin with {MAGIC!r}, found {head[:8]!r}")
    if len(head) < len(MAGIC) + 4:
        raise TruncatedError(f"the .kvl file ends in its head, after {len(head)} bytes")
    (version,) = struct.unpack("<I", head[len(MAGIC) :])
    if version != FORMAT_VERSION:
        raise RemoteProtocolError(f".kvl format version: expected {FORMAT_VERSION}, found {version}")
    number = 0
    while length := source.read(4):
        if len(length) < 4:
            raise TruncatedError(f"the .kvl file ends inside the length of frame {number}")
        (size,) = struct.unpack("<I", length)
        if size > max_frame_bytes:
            raise LimitError(f"frame {number}: at most {max_frame_bytes} bytes, the file says {size}")
        frame = source.read(size)
        if len(frame) < size:
            raise TruncatedError(f"frame {number}: expected {size} bytes, the file ends after {len(frame)}")
        yield frame
        number += 1
