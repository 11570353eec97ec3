"""Sessions: a transfer as a state machine, without sockets or clocks.

Purpose: `SendSession` turns a manifest and segments into frames; `ReceiveSession` turns frames
back into a manifest and segments, and refuses everything that the transition table does not
allow. Both ends use the one table below; the diagram in the docs is printed from it.

Bytes go in and come out as whole frames (`bytes` of one protobuf `Frame`). The digest runs over
those exact bytes.

Does not know: gRPC, files, tensors, time. Place on the path: frame and deframe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import google_crc32c
from blake3 import blake3
from google.protobuf.message import DecodeError

from kvlink.bounds import TEXT
from kvlink.codecs.base import PartCoder, PartKind, PartSize
from kvlink.errors import (
    IntegrityError,
    KvlinkError,
    LimitError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.payload import Group, Part, Segment, SegmentHeader
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire import checked
from kvlink.wire.layout import GroupPlace, check_header, groups_of, part_sizes
from kvlink.wire.messages import (
    DIGEST_BYTES,
    Manifest,
    header_from_proto,
    header_to_proto,
    manifest_from_proto,
    manifest_to_proto,
)

State = Literal["start", "open", "segment", "done", "failed"]
TRANSITIONS: dict[tuple[State, str], State] = {
    ("start", "manifest"): "open",
    ("open", "segment_header"): "segment",
    ("segment", "group"): "segment",
    ("segment", "chunk"): "segment",
    ("segment", "segment_end"): "open",
    ("open", "end"): "done",
}
"""(state, frame) → next state. Every other pair is a protocol error and leads to `failed`."""

CHUNK_BYTES = 512 * 1024
_CODERS: dict[PartCoder, pb.Coder] = {
    "identity": pb.CODER_IDENTITY,
    "zstd": pb.CODER_ZSTD,
    "rans": pb.CODER_RANS,
}
_CODER_NAMES = {value: name for name, value in _CODERS.items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts; checked before anything is allocated."""

    max_cache_bytes: int = 4_000_000_000
    max_context_tokens: int = 1_000_000
    max_frame_bytes: int = 4_000_000
    max_frames: int = 1_000_000
    max_segments: int = 64
    max_text_bytes: int = TEXT.most


@dataclass(frozen=True, slots=True)
class ManifestReceived:
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class SegmentOpened:
    """A header that fits the manifest and what came before. `index` counts from 0."""

    index: int
    header: SegmentHeader


@dataclass(frozen=True, slots=True)
class GroupReceived:
    """A whole group: its checksums matched. It may be decoded, but not used before its segment has closed."""

    place: GroupPlace
    group: Group


@dataclass(frozen=True, slots=True)
class SegmentClosed:
    """The digest matched: what the segment brought may be used."""

    index: int


@dataclass(frozen=True, slots=True)
class TransferComplete:
    segments: int


Event = ManifestReceived | SegmentOpened | GroupReceived | SegmentClosed | TransferComplete


class SendSession:
    """Frames of one transfer, in order. Each method returns the frames that it added."""

    def __init__(self, manifest: Manifest, chunk_bytes: int = CHUNK_BYTES) -> None:
        if not 1 <= chunk_bytes <= 4_000_000:
            raise LocalProtocolError(f"chunks must have 1 to 4000000 bytes, got {chunk_bytes}")
        self.manifest = manifest
        self.state: State = "start"
        self._chunk_bytes = chunk_bytes
        self._sequence = 0
        self._segments = 0
        self._digest = blake3()
        self.cache_digest = manifest.base.digest if manifest.base else b""
        """16 bytes that name what a receiver holds after the segments so far, see `Base` in the proto."""

    def open(self) -> bytes:
        """The manifest frame."""
        return self._frame("manifest", manifest=manifest_to_proto(self.manifest))

    def segment(self, header: SegmentHeader, groups: Iterable[Group]) -> Iterator[bytes]:
        """The frames of one segment, each as soon as its group is there."""
        yield self._frame("segment_header", segment_header=header_to_proto(header, self._segments))
        for frames in map(self._group, groups):  # no name holds a group that was sent
            yield from frames
        digest = self._digest.digest()
        self.cache_digest = digest[:DIGEST_BYTES]
        yield self._frame("segment_end", segment_end=pb.SegmentEnd(digest=digest))
        self._segments += 1

    def _group(self, group: Group) -> Iterator[bytes]:
        slices = _slices((part.data for part in group.parts), self._chunk_bytes)
        data = next(slices, b"")
        parts = [pb.Part(coder=_CODERS[p.coder], coded_bytes=p.coded_bytes) for p in group.parts]
        message = pb.Group(
            parts=parts, scale_bytes=bytes(group.scale_bytes), crc32c=google_crc32c.value(data), data=data
        )
        yield self._frame("group", group=message)
        offset = len(data)
        for data in slices:
            chunk = pb.Chunk(offset=offset, crc32c=google_crc32c.value(data), data=data)
            offset += len(data)
            yield self._frame("chunk", chunk=chunk)

    def transfer(self, segments: Iterable[Segment]) -> Iterator[bytes]:
        """All frames of a transfer."""
        yield self.open()
        for segment in segments:
            yield from self.segment(segment.header, segment.groups)
        yield self.end()

    def end(self) -> bytes:
        """The last frame."""
        return self._frame("end", end=pb.End(digest=self._digest.digest(), segments=self._segments))

    def _frame(self, kind: str, **body: object) -> bytes:
        state = TRANSITIONS.get((self.state, kind))
        if state is None:
            raise LocalProtocolError(f"a {kind} frame cannot follow in state {self.state}")
        self.state = state
        data = pb.Frame(sequence=self._sequence, **body).SerializeToString()  # type: ignore[arg-type]
        self._sequence += 1
        self._digest.update(data)
        return data


def _slices(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The joined parts in slices of `size` bytes; the last one may be shorter."""
    pieces, length = list[memoryview](), 0
    for part in parts:
        left = memoryview(part)
        while left:
            piece = left[: size - length]
            pieces.append(piece)
            left, length = left[len(piece) :], length + len(piece)
            if length == size:
                yield b"".join(pieces)
                pieces, length = [], 0
    if pieces:
        yield b"".join(pieces)


class ReceiveSession:
    """Frames in, events out. After an error the session is `failed` and takes nothing more.

    What an event hands out is checked: every group against its checksums, every closed segment
    against the digest of all bytes so far. Raises RemoteProtocolError, IntegrityError,
    LimitError, TruncatedError; each names the frame.
    """

    def __init__(self, limits: Limits | None = None, *, keep: bool = True) -> None:
        """`keep` False: a session that only checks; its groups hold no bytes and are not told."""
        self.limits = limits or Limits()
        self._keep = keep
        self.state: State = "start"
        self.manifest: Manifest | None = None
        self._next_sequence = 0
        self._segments = 0
        self._digest = blake3()
        self._header: SegmentHeader | None = None
        self._sliding_due = True
        self.cache_digest = b""
        """16 bytes that name what has closed so far, see `Base` in the proto; empty before."""
        self._present = 0  # positions of each set that came in segments so far
        self._awaited: list[GroupPlace] = []
        self._open_parts: tuple[_PartHeader, ...] = ()
        self._scale_bytes: tuple[int, ...] = ()
        self._buffer = bytearray()
        self._received = 0
        self.part_bytes: dict[str, int] = {}
        """Coded bytes by kind of part, those of a group that is not whole included."""
        self.closed: list[SegmentHeader] = []
        """Headers of the segments that have closed, in order."""

    @property
    def next_sequence(self) -> int:
        """The frame that is expected next: where a broken transfer continues."""
        return self._next_sequence

    def receive(self, data: bytes) -> list[Event]:
        """Take one frame."""
        try:
            return self._receive(data)
        except KvlinkError:
            self.state = "failed"
            self._buffer = bytearray()
            raise

    def close(self) -> None:
        """Say that no more frames come. Raises TruncatedError unless the transfer is complete."""
        if self.state != "done":
            found = self.state
            self.state = "failed"
            raise TruncatedError(
                f"the transfer ends after frame {self._next_sequence - 1} in state {found}; expected an end frame"
            )

    def _receive(self, data: bytes) -> list[Event]:
        where = f"frame {self._next_sequence}"
        if len(data) > self.limits.max_frame_bytes + 1024:
            raise LimitError(f"{where}: at most {self.limits.max_frame_bytes} bytes, found {len(data)}")
        if self._next_sequence >= self.limits.max_frames:
            raise LimitError(f"{where}: at most {self.limits.max_frames} frames")
        frame = pb.Frame()
        try:
            checked.count(frame.DESCRIPTOR, data, RemoteProtocolError)
            frame.ParseFromString(data)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{where}: not a frame: {error}") from None
        except DecodeError as error:
            raise RemoteProtocolError(f"{where}: not a frame: {error}") from error
        kind = frame.WhichOneof("body")
        if kind is None:
            raise RemoteProtocolError(f"{where}: a frame without a body")
        if frame.sequence != self._next_sequence:
            raise RemoteProtocolError(
                f"{where}: expected sequence {self._next_sequence}, found {frame.sequence}"
            )
        state = TRANSITIONS.get((self.state, kind))
        if state is None:
            raise RemoteProtocolError(f"{where}: a {kind} frame cannot follow in state {self.state}")
        events = getattr(self, f"_on_{kind}")(getattr(frame, kind), where)
        self.state = state
        self._next_sequence += 1
        self._digest.update(data)
        return list(events)

    def _on_manifest(self, message: pb.Manifest, where: str) -> list[Event]:
        try:
            manifest = manifest_from_proto(message)
        except KvlinkError as error:
            raise type(error)(f"{where}: {error}") from error
        shape, limits = manifest.shape, self.limits
        for name, found, most in (
            ("context tokens", shape.tokens, limits.max_context_tokens),
            ("cache bytes", shape.cache_bytes if manifest.mode == "kv" else 0, limits.max_cache_bytes),
            ("text bytes", manifest.text_bytes, limits.max_text_bytes),
        ):
            if found > most:
                raise LimitError(f"{where}: at most {most} {name}, the manifest declares {found}")
        self.manifest = manifest
        if base := manifest.base:
            self._present, self.cache_digest = base.kept, base.digest
            self._sliding_due = base.tokens < shape.tokens
        return [ManifestReceived(manifest)]

    def _on_segment_header(self, message: pb.SegmentHeader, where: str) -> list[Event]:
        if self._segments >= self.limits.max_segments:
            raise LimitError(f"{where}: at most {self.limits.max_segments} segments")
        if message.index != self._segments:
            raise RemoteProtocolError(f"{where}: expected segment {self._segments}, found {message.index}")
        try:
            header = header_from_proto(message)
            self._open(header)
        except KvlinkError as error:
            raise type(error)(f"{where}: {error}") from error
        self._header = header
        return [SegmentOpened(self._segments, header)]

    def _open(self, header: SegmentHeader) -> None:
        """Check a header against the manifest and what came before."""
        manifest = self.told()
        if (header.adds == "text") is not (manifest.mode == "text"):
            raise RemoteProtocolError(
                f"a segment that adds {header.adds} in a transfer of mode {manifest.mode}"
            )
        if header.adds == "text":
            if self._segments:
                raise RemoteProtocolError("a text comes in one segment")
        else:
            check_header(header, manifest.shape, self._present, self._sliding_due)
            recipe = manifest.recipe
            if header.adds == "positions":
                if header.codec not in (recipe.codec, recipe.background):
                    raise RemoteProtocolError(f"a segment's codec is not of the recipe {recipe}")
                self._present += header.kept
                self._sliding_due = False
        self._awaited = groups_of(header, manifest.shape)

    def _on_group(self, message: pb.Group, where: str) -> list[Event]:
        manifest, header = self.told(), self._header
        if self._open_parts:
            raise RemoteProtocolError(f"{where}: a group begins before the one before it is whole")
        if not self._awaited or header is None:
            raise RemoteProtocolError(f"{where}: more groups than the segment has")
        place = self._awaited[0]
        try:
            sizes = part_sizes(place, header, manifest.shape, message.scale_bytes, manifest.text_bytes)
        except KvlinkError as error:
            raise type(error)(f"{where}: {error}") from error
        self._open_parts = _read_parts(message, sizes, where)
        self._scale_bytes = tuple(message.scale_bytes)
        self._buffer, self._received = bytearray(), 0
        return self._take(message.data, message.crc32c, where)

    def _on_chunk(self, message: pb.Chunk, where: str) -> list[Event]:
        if message.offset != self._received:
            raise RemoteProtocolError(f"{where}: expected offset {self._received}, found {message.offset}")
        return self._take(message.data, message.crc32c, where)

    def _take(self, data: bytes, claimed: int, where: str) -> list[Event]:
        """Bytes of the open group; the group once it is whole."""
        expected = sum(part.coded_bytes for part in self._open_parts)
        if not data:
            raise RemoteProtocolError(f"{where}: no bytes")
        if self._received + len(data) > expected:
            raise RemoteProtocolError(f"{where}: the group has {expected} bytes, more come")
        found = google_crc32c.value(data)
        if found != claimed:
            raise IntegrityError(
                f"{where}: bytes at offset {self._received}: expected crc32c {claimed:08x}, found {found:08x}"
            )
        self._count(self._received, self._received + len(data))
        self._received += len(data)
        if self._keep:
            self._buffer += data
        if self._received < expected:
            return []
        place = self._awaited.pop(0)
        if not self._keep:
            self._open_parts = ()
            return []
        cut, at = [], 0
        for part in self._open_parts:
            cut.append(
                Part(part.kind, part.coder, part.plain_bytes, bytes(self._buffer[at : at + part.coded_bytes]))
            )
            at += part.coded_bytes
        self._open_parts, self._buffer = (), bytearray()
        return [GroupReceived(place, Group(tuple(cut), self._scale_bytes))]

    def _count(self, begin: int, end: int) -> None:
        """Bytes `begin` to `end` of the open group, by the kind of the part that they belong to."""
        at = 0
        for part in self._open_parts:
            found = min(end, at + part.coded_bytes) - max(begin, at)
            if found > 0:
                self.part_bytes[part.kind] = self.part_bytes.get(part.kind, 0) + found
            at += part.coded_bytes

    def _on_segment_end(self, message: pb.SegmentEnd, where: str) -> list[Event]:
        if self._awaited or self._open_parts:
            raise RemoteProtocolError(f"{where}: the segment ends, {len(self._awaited)} groups have not come")
        self._check_digest(message.digest, where)
        self.cache_digest = message.digest[:DIGEST_BYTES]
        self._segments += 1
        if self._header is not None:
            self.closed.append(self._header)
        return [SegmentClosed(self._segments - 1)]

    def told(self) -> Manifest:
        """The manifest. Raises RemoteProtocolError before it has come."""
        if self.manifest is None:
            raise RemoteProtocolError("no manifest came")
        return self.manifest

    def _on_end(self, message: pb.End, where: str) -> list[Event]:
        self._check_digest(message.digest, where)
        manifest = self.told()
        if message.segments != self._segments or not (self._segments or manifest.base):
            raise RemoteProtocolError(
                f"{where}: {self._segments} segments came, the end names {message.segments}"
            )
        if manifest.base and self._sliding_due and manifest.shape.whole_layers:
            raise RemoteProtocolError(
                f"{where}: layers with a sliding window of a longer context did not come"
            )
        return [TransferComplete(self._segments)]

    def _check_digest(self, claimed: bytes, where: str) -> None:
        found = self._digest.digest()
        if claimed != found:
            raise IntegrityError(
                f"{where}: digest of all frames so far: expected {found.hex()[:12]}, the frame says {claimed.hex()[:12]}"
            )


@dataclass(frozen=True, slots=True)
class _PartHeader:
    kind: PartKind
    coder: PartCoder
    plain_bytes: int
    coded_bytes: int


def _read_parts(message: pb.Group, sizes: list[PartSize], where: str) -> tuple[_PartHeader, ...]:
    """The parts that a group announces, each at most as large as it is plain."""
    if len(message.parts) != len(sizes):
        raise RemoteProtocolError(f"{where}: expected {len(sizes)} parts, found {len(message.parts)}")
    parts = []
    for number, (part, (kind, size)) in enumerate(zip(message.parts, sizes, strict=True)):
        coder = _CODER_NAMES.get(part.coder)
        if coder is None:
            raise RemoteProtocolError(f"{where}: part {number} ({kind}): unknown coder {part.coder}")
        if part.coded_bytes > size or (coder == "identity" and part.coded_bytes != size):
            raise RemoteProtocolError(
                f"{where}: part {number} ({kind}, {coder}): {size} plain bytes, {part.coded_bytes} coded ones"
            )
        parts.append(_PartHeader(kind, coder, size, part.coded_bytes))
    return tuple(parts)


def diagram() -> str:
    """The transition table as lines of text, for the documentation."""
    lines = [f"{state:8} ── {kind:14} ──▶ {after}" for (state, kind), after in TRANSITIONS.items()]
    return "\n".join([*lines, "any      ── anything else  ──▶ failed"])


def read_transfer(frames: Iterable[bytes]) -> tuple[Manifest, list[Segment]]:
    """Manifest and segments of a whole transfer. Raises what a session raises."""
    session, headers, groups = ReceiveSession(), list[SegmentHeader](), list[list[Group]]()
    for frame in frames:
        for event in session.receive(frame):
            if isinstance(event, SegmentOpened):
                headers.append(event.header)
                groups.append([])
            elif isinstance(event, GroupReceived):
                groups[-1].append(event.group)
    session.close()
    segments = [Segment(header, tuple(held)) for header, held in zip(headers, groups, strict=True)]
    return session.told(), segments
