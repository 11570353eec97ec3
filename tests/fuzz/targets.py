"""Fuzz targets: each takes any bytes and may raise nothing but the package's own errors.

The decoders are reached through a valid transfer whose content is replaced and whose checksums are made
right again: what a forger could send.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, partial

import google_crc32c
import torch
from blake3 import blake3
from google.protobuf.message import DecodeError

from kvlink.agent.builder import Builder
from kvlink.compress.lossless import unpack_part
from kvlink.errors import KvlinkError
from kvlink.payload import Fingerprint
from kvlink.profile import Profile, Side
from kvlink.recipe import Recipe
from kvlink.transport.handle import Handle
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.file import read_frames
from kvlink.wire.inspect import describe, listing
from kvlink.wire.messages import manifest_from_proto
from kvlink.wire.session import GroupReceived, Limits, ReceiveSession, SegmentOpened
from tests.wire.vectors import FOLDER, frames_of, make_vectors

LIMITS = Limits(max_cache_bytes=4_000_000, max_text_bytes=1_000_000)


def frame(data: bytes) -> None:
    """One frame in each state of a session."""
    for state in range(3):
        session = ReceiveSession(LIMITS)
        for valid in frames_of("int8")[:state]:
            session.receive(valid)
        _quietly(lambda s=session: s.receive(data))


def manifest(data: bytes) -> None:
    """A manifest as it stands in a frame."""
    _quietly(lambda: manifest_from_proto(pb.Manifest.FromString(data)))


def file(data: bytes) -> None:
    """A `.kvl` file, read, described and listed."""
    for read in (_receive_file, describe, listing):
        _quietly(lambda r=read: [None for _ in r(io.BytesIO(data)) or ()])  # type: ignore[operator]


def _receive_file(stream: io.BytesIO) -> list[None]:
    session = ReceiveSession(LIMITS)
    for one in read_frames(stream):
        session.receive(one)
    return []


def recipe(data: bytes) -> None:
    """A recipe as text and as JSON, and a handle."""
    text = data.decode("utf-8", errors="replace")
    for read in (Recipe.parse, Handle.parse):
        _quietly(lambda r=read: r(text))


def profile(data: bytes) -> None:
    """A profile's file."""
    _quietly(lambda: Profile.from_bytes(data))


def header(data: bytes) -> None:
    """A segment header behind a valid manifest."""
    _decode(frames_of("int4-kept"), lambda f: f.segment_header.ParseFromString(data), 1)


def content(name: str, data: bytes) -> None:
    """The first group of one kept vector: its selection map, or scales and codes of its first layer."""

    def change(one: pb.Frame) -> None:
        joined = one.group.data
        one.group.data = (data + joined[len(data) :])[: len(joined)] if data else joined

    _decode(frames_of(name), change, 2)


def _decode(frames: list[bytes], change: Callable[[pb.Frame], object], at: int) -> None:
    """Change one frame, make checksums and digests right, and take the transfer to its cache."""
    digest, session = blake3(), ReceiveSession(LIMITS)
    builders: list[Builder] = []

    def work() -> None:
        for number, valid in enumerate(frames):
            one = pb.Frame.FromString(valid)
            if number == at:
                change(one)
            kind = one.WhichOneof("body")
            if kind in ("chunk", "group"):
                getattr(one, kind).crc32c = google_crc32c.value(getattr(one, kind).data)
            elif kind in ("segment_end", "end"):
                getattr(one, kind).digest = digest.digest()
            raw = one.SerializeToString()
            digest.update(raw)
            for event in session.receive(raw):
                if isinstance(event, SegmentOpened):
                    builders[:1] = [Builder(session.told().shape, lambda _: make_vectors.known())]
                    builders[0].open(event.header)
                elif isinstance(event, GroupReceived) and event.place.kind == "text":
                    unpack_part(event.group.parts[0])
                elif isinstance(event, GroupReceived):
                    builders[0].add(event.place, event.group)

    _quietly(work)


def _quietly(work: Callable[[], object]) -> None:
    try:
        work()
    except (KvlinkError, DecodeError):
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frame": frame,
    "manifest": manifest,
    "file": file,
    "recipe": recipe,
    "profile": profile,
    "header": header,
    **{f"content-{path.stem}": partial(content, path.stem) for path in sorted(FOLDER.glob("*.kvl"))},
}


def _small_profile() -> bytes:
    """A profile of one layer with four channels."""
    sides = [Side(torch.zeros(4), torch.eye(4)[None], torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    mark = Fingerprint(*(bytes([number]) * 16 for number in range(5)))
    return Profile(mark, (sides[0],), (sides[1],), {"texts": "0"}, ((0, 0.5),)).to_bytes()


@cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Valid inputs to begin from."""
    if name.startswith("content-"):
        one = pb.Frame.FromString(frames_of(name.removeprefix("content-"))[2])
        return (one.group.data,)
    files = [path.read_bytes() for path in sorted(FOLDER.glob("*.kvl"))]
    vectors = [frames_of(path.stem) for path in sorted(FOLDER.glob("*.kvl"))]
    return {
        "frame": tuple(one for frames in vectors for one in frames),
        "manifest": tuple(
            pb.Frame.FromString(frames[0]).manifest.SerializeToString() for frames in vectors
        ),
        "file": tuple(files),
        "recipe": tuple(text.encode() for text, *_ in make_vectors.VECTORS.values()),
        "profile": (_small_profile(), _small_profile()[:40]),
        "header": (
            pb.Frame.FromString(frames_of("int4-kept")[1]).segment_header.SerializeToString(),
        ),
    }[name]  # fmt: skip
