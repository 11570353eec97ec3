"""Sessions: a transfer as a state machine, without sockets or clocks.

Purpose: `SendSession` turns a manifest and segments into frames; `ReceiveSession` turns frames
back into a manifest and segments, and refuses everything that the transition table does not
allow. Both ends use the one table below; the diagram in the docs is printed from it.

Bytes go in and come out as whole frames (`bytes` of one protobuf `Frame`). The digest runs over
those exact bytes.

Does not know: gRPC, files, tensors, time. Place on the path: frame and deframe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
from blake3 import blake3
from google.protobuf.message import DecodeError

from kvlink.bounds import TEXT
from kvlink.codecs.base import SIDES
from kvlink.errors import (
    IntegrityError,
    KvlinkError,
    LimitError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.payload import CacheShape, EncodedSegment, EncodedTensor, Part, PartKind
from kvlink.recipe import Recipe
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire import checked
from kvlink.wire.messages import Manifest, manifest_from_proto, manifest_to_proto

State = Literal["start", "open", "segment", "done", "failed"]
TRANSITIONS: dict[tuple[State, str], State] = {
    ("start", "manifest"): "open",
    ("open", "segment_header"): "segment",
    ("segment", "chunk"): "segment",
    ("segment", "segment_end"): "open",
    ("open", "end"): "done",
}
"""(state, frame) → next state. Every other pair is a protocol error and leads to `failed`."""

CHUNK_BYTES = 512 * 1024
_CODERS = {"identity": pb.CODER_IDENTITY, "zstd": pb.CODER_ZSTD, "rans": pb.CODER_RANS}
_CODER_NAMES = {value: name for name, value in _CODERS.items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts; checked before anything is allocated."""

    max_cache_bytes: int = 4_000_000_000
    max_context_tokens: int = 1_000_000
    max_frame_bytes: int = 4_000_000
    max_frames: int = 1_000_000
    max_segments: int = 1024
    max_text_bytes: int = TEXT.most


@dataclass(frozen=True, slots=True)
class ManifestReceived:
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class SegmentReceived:
    """A closed segment: its digest matched, it may be used."""

    segment: EncodedSegment


@dataclass(frozen=True, slots=True)
class TextReceived:
    """The closed segment of a text transfer."""

    part: Part


@dataclass(frozen=True, slots=True)
class TransferComplete:
    segments: int


Event = ManifestReceived | SegmentReceived | TextReceived | TransferComplete


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

    def open(self) -> bytes:
        """The manifest frame."""
        return self._frame("manifest", manifest=manifest_to_proto(self.manifest))

    def segment(self, segment: EncodedSegment | Part) -> Iterator[bytes]:
        """Header, chunks and end of one segment: a coded cache or the part of a text."""
        if isinstance(segment, Part):
            parts, header = [segment], pb.SegmentHeader(kind=pb.SEGMENT_KIND_TEXT)
        else:
            maps = [segment.selection_map] if segment.selection_map else []
            parts = [*maps, *(part for tensor in segment.tensors for part in tensor.parts)]
            header = pb.SegmentHeader(
                kind=pb.SEGMENT_KIND_POSITIONS,
                kept=segment.kept,
                map_sets=segment.map_sets,
                scale_bytes=bytes(tensor.scale_bytes for tensor in segment.tensors),
            )
        header.index = self._segments
        header.parts.extend(pb.Part(coder=_CODERS[p.coder], coded_bytes=p.coded_bytes) for p in parts)
        yield self._frame("segment_header", segment_header=header)
        offset = 0
        for data in _slices((part.data for part in parts), self._chunk_bytes):
            chunk = pb.Chunk(offset=offset, crc32c=google_crc32c.value(data), data=data)
            offset += len(data)
            yield self._frame("chunk", chunk=chunk)
        yield self._frame("segment_end", segment_end=pb.SegmentEnd(digest=self._digest.digest()))
        self._segments += 1

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
    buffer = bytearray()
    for part in parts:
        buffer += part
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


class ReceiveSession:
    """Frames in, events out. After an error the session is `failed` and takes nothing more.

    What an event hands out is checked: every chunk against its crc32c, every closed segment
    against the digest of all bytes so far. Raises RemoteProtocolError, IntegrityError,
    LimitError, TruncatedError; each names the frame.
    """

    def __init__(self, limits: Limits | None = None, *, keep: bool = True) -> None:
        """`keep` False: a session that only checks; its segments hold no bytes and are not told."""
        self.limits = limits or Limits()
        self._keep = keep
        self.state: State = "start"
        self.manifest: Manifest | None = None
        self._next_sequence = 0
        self._segments = 0
        self._digest = blake3()
        self._header: _Header | None = None
        self._buffer = bytearray()
        self._received = 0

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
        return [ManifestReceived(manifest)]

    def _on_segment_header(self, message: pb.SegmentHeader, where: str) -> list[Event]:
        assert self.manifest is not None  # the table: a manifest came first
        if self._segments >= self.limits.max_segments:
            raise LimitError(f"{where}: at most {self.limits.max_segments} segments")
        if message.index != self._segments:
            raise RemoteProtocolError(f"{where}: expected segment {self._segments}, found {message.index}")
        self._header = _Header.read(message, self.manifest, where)
        self._buffer = bytearray()
        self._received = 0
        return []

    def _on_chunk(self, message: pb.Chunk, where: str) -> list[Event]:
        assert self._header is not None  # the table: a header came first
        if message.offset != self._received:
            raise RemoteProtocolError(f"{where}: expected offset {self._received}, found {message.offset}")
        if not message.data:
            raise RemoteProtocolError(f"{where}: an empty chunk")
        if self._received + len(message.data) > self._header.coded_bytes:
            raise RemoteProtocolError(
                f"{where}: the segment has {self._header.coded_bytes} bytes, chunks bring more"
            )
        found = google_crc32c.value(message.data)
        if found != message.crc32c:
            raise IntegrityError(
                f"{where}: chunk at offset {message.offset}: expected crc32c {message.crc32c:08x}, found {found:08x}"
            )
        self._received += len(message.data)
        if self._keep:
            self._buffer += message.data
        return []

    def _on_segment_end(self, message: pb.SegmentEnd, where: str) -> list[Event]:
        assert self._header is not None  # the table: a header came first
        if self._received != self._header.coded_bytes:
            raise RemoteProtocolError(
                f"{where}: expected {self._header.coded_bytes} bytes in the segment, found {self._received}"
            )
        self._check_digest(message.digest, where)
        self._segments += 1
        if not self._keep:
            return []
        event = self._header.split(bytes(self._buffer))
        self._buffer = bytearray()
        return [event]

    def _on_end(self, message: pb.End, where: str) -> list[Event]:
        self._check_digest(message.digest, where)
        if message.segments != self._segments or not self._segments:
            raise RemoteProtocolError(
                f"{where}: {self._segments} segments came, the end names {message.segments}"
            )
        return [TransferComplete(self._segments)]

    def _check_digest(self, claimed: bytes, where: str) -> None:
        found = self._digest.digest()
        if claimed != found:
            raise IntegrityError(
                f"{where}: digest of all frames so far: expected {found.hex()[:12]}, the frame says {claimed.hex()[:12]}"
            )


@dataclass(frozen=True, slots=True)
class _Header:
    """A checked segment header: what each part is, and how large, before any byte is taken."""

    kept: int
    map_sets: int
    parts: tuple[tuple[PartKind, Literal["identity", "zstd", "rans"], int, int], ...]
    """(kind, coder, plain bytes, coded bytes) in wire order."""
    tensors: tuple[tuple[int, Literal["keys", "values"], tuple[int, int, int], int, int], ...]
    """(layer, side, shape, bytes per scale, number of parts)."""

    @property
    def coded_bytes(self) -> int:
        return sum(part[3] for part in self.parts)

    @classmethod
    def read(cls, message: pb.SegmentHeader, manifest: Manifest, where: str) -> _Header:
        expected = pb.SEGMENT_KIND_TEXT if manifest.mode == "text" else pb.SEGMENT_KIND_POSITIONS
        if message.kind != expected:
            raise RemoteProtocolError(
                f"{where}: expected {pb.SegmentKind.Name(expected)}, found kind {message.kind}"
            )
        tensors: list[tuple[int, Literal["keys", "values"], tuple[int, int, int], int, int]] = []
        if manifest.mode == "text":
            plain: list[tuple[PartKind, int]] = [("text", manifest.text_bytes)]
        else:
            plain, tensors = _expected_parts(message, manifest.shape, manifest.recipe, where)
        if len(message.parts) != len(plain):
            raise RemoteProtocolError(f"{where}: expected {len(plain)} parts, found {len(message.parts)}")
        parts = []
        for number, (part, (kind, size)) in enumerate(zip(message.parts, plain, strict=True)):
            coder = _CODER_NAMES.get(part.coder)
            if coder is None:
                raise RemoteProtocolError(f"{where}: part {number} ({kind}): unknown coder {part.coder}")
            if part.coded_bytes > size or (coder == "identity" and part.coded_bytes != size):
                raise RemoteProtocolError(
                    f"{where}: part {number} ({kind}, {coder}): {size} plain bytes, {part.coded_bytes} coded ones"
                )
            parts.append((kind, coder, size, part.coded_bytes))
        return cls(message.kept, message.map_sets, tuple(parts), tuple(tensors))  # type: ignore[arg-type]

    def split(self, data: bytes) -> SegmentReceived | TextReceived:
        """Cut the segment's bytes into its parts."""
        cut: list[Part] = []
        at = 0
        for kind, coder, plain, coded in self.parts:
            cut.append(Part(kind, coder, plain, data[at : at + coded]))
            at += coded
        if not self.tensors:
            return TextReceived(cut[0])
        selection_map = cut.pop(0) if self.map_sets else None
        tensors = []
        for layer, side, shape, scale_bytes, count in self.tensors:
            tensors.append(EncodedTensor(layer, side, shape, scale_bytes, tuple(cut[:count])))
            del cut[:count]
        return SegmentReceived(EncodedSegment(self.kept, self.map_sets, selection_map, tuple(tensors)))


def _expected_parts(
    message: pb.SegmentHeader, shape: CacheShape, recipe: Recipe, where: str
) -> tuple[list[tuple[PartKind, int]], list]:
    """Kinds and plain sizes of all parts of a segment of positions, from shape × recipe."""
    if not 1 <= message.kept <= shape.tokens:
        raise RemoteProtocolError(f"{where}: kept must be from 1 to {shape.tokens}, found {message.kept}")
    whole = dict(shape.whole_layers)
    most_sets = (shape.layers - len(whole)) * shape.kv_heads
    allowed = (0,) if message.kept == shape.tokens else (1, most_sets)
    if message.map_sets not in allowed:
        raise RemoteProtocolError(f"{where}: expected {allowed} position sets, found {message.map_sets}")
    if len(message.scale_bytes) != 2 * shape.layers or set(message.scale_bytes) - {2, 4}:
        raise RemoteProtocolError(f"{where}: expected {2 * shape.layers} scale widths of 2 or 4 bytes")
    plain: list[tuple[PartKind, int]] = []
    if message.map_sets:
        plain.append(("map", message.map_sets * -(-shape.tokens // 8)))
    tensors: list[Any] = []
    for layer in range(shape.layers):
        held = shape.held_tokens(layer, shape.tokens if recipe.covers_all else message.kept)
        tensor = (shape.kv_heads, held, shape.head_size)
        for side in SIDES:
            scale_bytes = message.scale_bytes[len(tensors)]
            sizes = recipe.codec.part_sizes(layer, side, tensor, shape.element_bytes, scale_bytes)
            plain += sizes
            tensors.append((layer, side, tensor, scale_bytes, len(sizes)))
    return plain, tensors


def diagram() -> str:
    """The transition table as lines of text, for the documentation."""
    lines = [f"{state:8} ── {kind:14} ──▶ {after}" for (state, kind), after in TRANSITIONS.items()]
    return "\n".join([*lines, "any      ── anything else  ──▶ failed"])


def segment_of(frames: Sequence[bytes]) -> EncodedSegment:
    """The segment of a whole transfer of one, read back from its frames. Raises what a session raises."""
    session = ReceiveSession()
    for frame in frames:
        for event in session.receive(frame):
            if isinstance(event, SegmentReceived):
                return event.segment
    raise TruncatedError("the frames bring no segment of a cache")
