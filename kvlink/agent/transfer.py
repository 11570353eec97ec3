"""A transfer on its way out, packed while it is read.

    plans of segments ─▶ encode a layer ─▶ frame ─▶ whoever reads: a file, a connection, a search for a size

The first frames can leave while later layers are still to be coded. What was made is kept for the next
reader, unless it is read by `stream`, which keeps nothing: then no more than a layer's codes are in memory.

Does not know: models, why positions were chosen, sockets. Place on the path: the sender's last step.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from kvlink.codecs import Codec
from kvlink.codecs.base import PART_KINDS
from kvlink.compress.codec import SegmentPlan, encode_groups
from kvlink.compress.codecs import CodecContext
from kvlink.errors import CodecError, RemoteProtocolError
from kvlink.model.generate import Answer
from kvlink.payload import CacheShape, Group, Part, SegmentHeader, count_kinds
from kvlink.receipt import Certificate, Receipt
from kvlink.transport.link import AddedBytes, added_by_nothing
from kvlink.wire.file import Writable, write_frames
from kvlink.wire.layout import groups_of, kept_share, kept_tokens, part_sizes
from kvlink.wire.messages import Manifest
from kvlink.wire.session import CHUNK_BYTES, ReceiveSession, SendSession

_MOST_FRAMING_BYTES = 160
"""Of a frame of parts: numbers, sizes of parts, checksums, digests."""

OnProgress = Callable[[str, int, int], object]
"""Told a stage and how much of how much of it is done: `read`, in layers of the model, or `encode`, in groups of
the segments (a layer each, or a selection map). What it raises ends the work."""

Outline = tuple[SegmentHeader, Iterator[Group]]
"""A segment whose groups are made when they are asked for."""


class Transfer:
    """All frames of a transfer, made in their order when somebody asks. For several threads.

    `manifest`: its first frame's content. `draft`: the sender's own answer, if one was made.
    """

    def __init__(
        self,
        manifest: Manifest,
        outlines: Sequence[Outline],
        receipt: Receipt,
        draft: Answer | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        on_closed: Callable[[int, bytes], None] | None = None,
        added_bytes: AddedBytes = added_by_nothing,
    ) -> None:
        """`receipt`: what is known before anything is packed; bytes and the time to encode are added. `on_closed` is
        told how many segments have closed, and the digest of what a receiver holds then. `added_bytes`: of the link
        that it will take, for the receipt."""
        self.manifest = manifest
        self.draft = draft
        self._receipt = receipt
        self._headers = [header for header, _ in outlines]
        self._chunk_bytes, self._on_closed, self._added_bytes = chunk_bytes, on_closed, added_bytes
        self._made: list[bytes] = []
        self._most_bytes = 0
        self._kept, self._ended = True, False
        self._error: Exception | None = None
        self._source: Iterator[bytes] | None = self._pack(outlines)
        self._lock = threading.Lock()

    @classmethod
    def of_frames(
        cls,
        manifest: Manifest,
        frames: Sequence[bytes],
        receipt: Receipt,
        added_bytes: AddedBytes = added_by_nothing,
    ) -> Transfer:
        """One that was packed before."""
        found = cls(manifest, (), receipt, added_bytes=added_bytes)
        found._made, found._source = list(frames), None
        found._most_bytes = sum(map(len, frames))
        return found

    def __iter__(self) -> Iterator[bytes]:
        """The frames, those that were made and then the others as they are made; they are kept."""
        number = 0
        while (frame := self.frame(number)) is not None:
            yield frame
            number += 1

    def frame(self, number: int) -> bytes | None:
        """Frame `number`, made if need be; None behind the last one."""
        with self._lock:
            if not self._kept:
                raise CodecError("the frames of this transfer were streamed and are not kept; pack it again")
            while number >= len(self._made) and self._source is not None:
                self._advance()
            return self._made[number] if number < len(self._made) else None

    def made(self, number: int) -> bytes | None:
        """Frame `number` if it was made already; never waits."""
        return self._made[number] if number < len(self._made) else None

    @property
    def frames(self) -> tuple[bytes, ...]:
        """All of them."""
        return tuple(self)

    @property
    def is_packed(self) -> bool:
        """Whether every frame was made."""
        return self._source is None

    @property
    def count(self) -> int | None:
        """Frames, once all were made and kept; never waits."""
        return len(self._made) if self.is_packed and self._kept else None

    def stream(self) -> Iterator[bytes]:
        """The frames, for one reader; those that are still to be made are not kept.

        Raises CodecError where the cache holds what its codec cannot take.
        """
        with self._lock:
            made, source = list(self._made), self._source
            if not self._kept:
                raise CodecError("the frames of this transfer were streamed and are not kept; pack it again")
            self._kept = source is None
        yield from made
        if source is not None:
            yield from source
            self._source = None

    def write(self, out: Writable) -> int:
        """Write a `.kvl` file; returns its bytes."""
        return write_frames(self.stream(), out)

    @property
    def receipt(self) -> Receipt:
        """What it cost; packs what is still to be packed."""
        with self._lock:
            while self._source is not None and self._kept:
                self._advance()
        if self._source is not None:
            raise CodecError("a transfer that is streamed has its receipt when its last frame was read")
        return self._receipt

    def receipt_until(self, sent: int, taken: int) -> Receipt:
        """What the first `sent` frames cost, where the receiver had enough of the first `taken` ones.

        Raises RemoteProtocolError where no segment closes in those: then nothing can be held of them.
        """
        session, closed, digest = ReceiveSession(keep=False), list[SegmentHeader](), b""
        frames = self._made[: max(sent, taken)]
        for number, frame in enumerate(frames, 1):
            session.receive(frame)
            if number == taken:
                closed, digest = list(session.closed), session.cache_digest
        if not closed:
            raise RemoteProtocolError(
                f"the receiver has enough of {taken} frames, in which no segment closes"
            )
        told = self.manifest
        return replace(
            self._receipt,
            kept_tokens=kept_tokens(closed, told.recipe),
            kept_share=kept_share(closed, told.shape, told.base),
            segments=len(closed),
            bytes=count_bytes([len(frame) for frame in frames], session.part_bytes, self._added_bytes),
            cache_digest=digest.hex(),
        )

    def note(self, stage_s: Mapping[str, float], certificate: Certificate | None = None) -> None:
        """Add to the receipt what was found later."""
        with self._lock:
            told = self._receipt.with_stages(**stage_s)
            self._receipt = replace(told, certificate=certificate) if certificate else told

    @property
    def most_bytes(self) -> int:
        """Bytes that the frames have at most, known before they are packed; where they are packed, all."""
        if not self._most_bytes:
            self._most_bytes = self._bound()
        return self._most_bytes

    def _bound(self) -> int:
        told, opening = self.manifest, len(self.frame(0) or b"")
        sizes = [
            sum(
                size
                for _, size in part_sizes(
                    place, header, told.shape, bytes([4] * place.tensors), told.text_bytes
                )
            )
            for header in self._headers
            for place in groups_of(header, told.shape)
        ]
        frames = 1 + sum(1 + size // self._chunk_bytes for size in sizes) + len(self._headers)
        # A segment's header is no longer than the manifest, which has its codec too.
        return sum(sizes) + _MOST_FRAMING_BYTES * frames + opening * (1 + len(self._headers))

    def _advance(self) -> None:
        """Make one more frame. The lock is held. What packing raises it raises for every reader."""
        if self._error is not None:
            raise self._error
        if self._source is None:
            return
        try:
            self._made.append(next(self._source))
        except Exception as error:
            self._error = error
            raise
        if self._ended:
            self._source = None

    def _pack(self, outlines: Sequence[Outline]) -> Iterator[bytes]:
        session, sizes = SendSession(self.manifest, self._chunk_bytes), list[int]()
        kinds: dict[str, int] = dict.fromkeys(PART_KINDS, 0)
        clock = _Watch()

        def counted(group: Group) -> Group:
            for kind, count in count_kinds([group]).items():
                kinds[kind] += count
            return group

        def frames() -> Iterator[bytes]:
            yield session.open()
            for count, (header, groups) in enumerate(outlines, 1):
                yield from session.segment(header, map(counted, clock.over(groups)))
                if self._on_closed is not None:
                    self._on_closed(count, session.cache_digest)

        for frame in frames():
            sizes.append(len(frame))
            yield frame
        last = session.end()
        sizes.append(len(last))
        self._most_bytes = sum(sizes)
        told = self._receipt.with_stages(encode=self._receipt.stage_s.get("encode", 0.0) + clock.seconds)
        self._receipt = replace(
            told, bytes=count_bytes(sizes, kinds, self._added_bytes), cache_digest=session.cache_digest.hex()
        )
        # Before anybody asks for another frame: a receiver may answer this one sooner.
        self._ended = True
        yield last


def reported(outlines: Sequence[Outline], shape: CacheShape, progress: OnProgress) -> list[Outline]:
    """The segments, with every group told to `progress` once it is coded."""
    total = sum(1 for header, _ in outlines for _ in groups_of(header, shape))
    count = itertools.count(1)

    def told(group: Group) -> Group:
        progress("encode", next(count), total)
        return group

    return [(header, map(told, groups)) for header, groups in outlines]


class Sent:
    """Bytes of a transfer's frames from the first one on."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._ends: list[int] = []

    def until(self, number: int) -> int:
        """Bytes of the frames up to `number`, which were made."""
        while len(self._ends) <= number:
            frame = self._transfer.made(len(self._ends)) or b""
            self._ends.append((self._ends[-1] if self._ends else 0) + len(frame))
        return self._ends[number]


def outlined(plan: SegmentPlan, coder: str, context_of: Callable[[Codec], CodecContext]) -> Outline:
    """A planned segment; what its codec knows of the model is asked for when the first group is."""

    def groups() -> Iterator[Group]:
        codec = plan.header.codec
        context = CodecContext() if codec is None else context_of(codec)
        yield from encode_groups(plan, coder, context)  # type: ignore[arg-type]

    return plan.header, groups()


def outlined_text(part: Part) -> Outline:
    return SegmentHeader("text"), iter([Group((part,))])


def count_bytes(
    frame_bytes: Sequence[int], kinds: dict[str, int], added_bytes: AddedBytes = added_by_nothing
) -> dict[str, int]:
    """Bytes by kind of a transfer, with what its link adds; their sum is all that travels, TCP and IP excepted."""
    return {
        "manifest": frame_bytes[0],
        **{kind: count for kind, count in kinds.items() if count},
        "framing": sum(frame_bytes[1:]) - sum(kinds.values()),
        **added_bytes(frame_bytes),
    }


class _Watch:
    """Seconds that iterators take for their items, without what their readers do between them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterator[Group]) -> Iterator[Group]:
        """The items; none is held here once it is handed out."""
        return iter(lambda: self._next(items), None)  # type: ignore[arg-type, return-value]

    def _next(self, items: Iterator[Group]) -> Group | None:
        began = time.perf_counter()
        try:
            return next(items, None)
        finally:
            self.seconds += time.perf_counter() - began
