"""Transfers that are almost honest: real frames, a few of them changed, checksums and digests made right again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import google_crc32c
from blake3 import blake3

from kvlink.v1 import wire_pb2 as pb
from tests.fuzz.messages import Maker

_DATA = ("group", "chunk")
_DIGESTS = ("segment_end", "end")


def almost_honest(transfers: Sequence[Sequence[bytes]], maker: Maker) -> list[bytes]:
    """One of the transfers under an id of its own, with one to three slips in one to three frames."""
    rng = maker.rng
    frames = _chunked([pb.Frame.FromString(frame) for frame in rng.choice(transfers)], rng)
    others = rng.choice(transfers)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _slip(frames, others, maker)
    renamed = rng.random() < 0.95
    if frames and renamed and frames[0].WhichOneof("body") == "manifest":
        frames[0].manifest.transfer_id = rng.randbytes(16)
    return sealed(frames, rng)


def _chunked(frames: Sequence[pb.Frame], rng: random.Random) -> list[pb.Frame]:
    """The same transfer, its bytes cut into other chunks: one to eight for each that there was."""
    made: list[pb.Frame] = []
    for frame in frames:
        if frame.WhichOneof("body") != "chunk":
            made.append(frame)
            continue
        data, at = frame.chunk.data, frame.chunk.offset
        cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(rng.choice((0, 1, 3, 7))))})
        for begin, end in itertools.pairwise(cuts):
            made.append(pb.Frame(chunk=pb.Chunk(offset=at + begin, data=data[begin:end])))
    return made


def _slip(frames: list[pb.Frame], others: Sequence[bytes], maker: Maker) -> None:
    """One frame lost, doubled, moved, foreign, random or changed in a field."""
    rng = maker.rng
    if not frames:
        return
    at, kind = rng.randrange(len(frames)), rng.random()
    if kind < 0.06:
        del frames[at]
    elif kind < 0.12:
        frames.insert(rng.randrange(len(frames) + 1), frames[at])
    elif kind < 0.18:
        other = rng.randrange(len(frames))
        frames[at], frames[other] = frames[other], frames[at]
    elif kind < 0.24:
        frames[at] = pb.Frame.FromString(rng.choice(others))
    elif kind < 0.28:
        frames[at] = maker.message(pb.Frame.DESCRIPTOR)
    elif kind < 0.32:
        del frames[at:]
    else:
        frames[at] = _changed(frames[at], maker)


def _changed(frame: pb.Frame, maker: Maker) -> pb.Frame:
    """A frame whose body has other values: of a group or a chunk mostly its data, of the others any field."""
    made = pb.Frame()
    made.CopyFrom(frame)
    kind = made.WhichOneof("body")
    if kind is None:
        return made
    body = getattr(made, kind)
    if kind in _DATA and maker.rng.random() < 0.8:
        body.data = maker.damaged(body.data)
    else:
        body.CopyFrom(maker.changed(body))
    return made


def sealed(frames: Sequence[pb.Frame], rng: random.Random) -> list[bytes]:
    """The frames as bytes; mostly with sequence numbers, checksums and digests that are right."""
    numbers, sums, digests = (rng.random() < 0.95 for _ in range(3))
    digest, made = blake3(), []
    for number, frame in enumerate(frames):
        one = pb.Frame()
        one.CopyFrom(frame)
        if numbers:
            one.sequence = number
        kind = one.WhichOneof("body")
        if kind in _DATA and sums:
            held = getattr(one, kind)
            held.crc32c = google_crc32c.value(held.data)
        elif kind in _DIGESTS and digests:
            getattr(one, kind).digest = digest.digest()
        made.append(one.SerializeToString())
        digest.update(made[-1])
    return made
