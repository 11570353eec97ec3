"""Random mutations of valid transfers: each is refused by an error of the package, or changes nothing.

Two kinds. *Damage*: bytes, frames and files as a bad line, a bad disk or a replay would leave them; an
answer from it must be the answer of the original. *Forgery*: the checksums are made right again, as by
somebody who knows the format; then another cache may come out, but no other exception, no allocation
beyond the limits and no hang.
"""

from __future__ import annotations

import io
import random
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import google_crc32c
import torch
from blake3 import blake3

from kvlink.agent.receiver import Held, Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import KvlinkError
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.file import write_frames
from kvlink.wire.inspect import describe
from kvlink.wire.session import Limits

TEXT = (
    "Mira Dosh was born in Tavik. Rom Tecil plays the cello in Naklo. Jand Faris leads the Verrin Institute."
)
QUESTION = "Where was Mira Dosh born?"
RECIPES = (
    "text", "raw", "lossless", "int8", "int3", "q2c@0.5 int4", "q2c+draft@0.25 int4 scope=head",
    "svd=8 int8", "transform=1", "transform=1 basis=own", "q2c+draft@0.25 transform=0.5 rest=2",
)  # fmt: skip
HANG_S = 20
LIMITS = Limits(max_cache_bytes=8_000_000, max_text_bytes=100_000)


@dataclass(slots=True)
class Report:
    tried: int = 0
    refused: int = 0
    identical: int = 0
    forged: int = 0
    wrong: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """Exceptions that are none of the package's, and hangs."""
    by_error: dict[str, int] = field(default_factory=dict)
    grown_bytes: int = 0


class HangError(Exception):
    """A mutation that takes too long."""


def transfers(sender: Sender) -> dict[str, tuple[bytes, ...]]:
    """One valid transfer of each recipe, in small chunks."""
    context = sender.read(TEXT)
    return {recipe: sender.pack(context, QUESTION, recipe).frames for recipe in RECIPES}


def damaged(frames: Sequence[bytes], others: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """The transfer after one to three accidents."""
    found = list(frames)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(found)) if found else 0
        kind = rng.randrange(10)
        if not found:
            break
        if kind < 5:
            found[at] = _bytes(found[at], rng)
        elif kind == 5:
            del found[at]
        elif kind == 6:
            found.insert(rng.randrange(len(found) + 1), found[at])
        elif kind == 7:
            other = rng.randrange(len(found))
            found[at], found[other] = found[other], found[at]
        elif kind == 8:
            found[at] = rng.choice(others)
        else:
            found = found[:at]
    return found


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """One frame after an accident: a bit, a byte, a run of bytes."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(4))
    at, changed = rng.randrange(len(data)), bytearray(data)
    kind = rng.randrange(6)
    if kind <= 1:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[at] = rng.choice((0, 1, 127, 128, 255))
    elif kind == 3:
        changed[at:at] = rng.randbytes(rng.randint(1, 9))
    elif kind == 4:
        del changed[at : at + rng.randint(1, 40)]
    else:
        end = min(len(changed), at + rng.randint(1, 40))
        changed[at:end] = rng.randbytes(end - at)
    return bytes(changed)


def forged(frames: Sequence[bytes], rng: random.Random) -> list[bytes] | None:
    """A transfer with other content whose checksums and digests are right; None where it is no frame."""
    parsed = [pb.Frame.FromString(frame) for frame in frames]
    frame = rng.choice(parsed)
    kind = frame.WhichOneof("body")
    body = getattr(frame, kind)
    if kind in ("chunk", "group"):
        body.data = _bytes(body.data, rng)
        if kind == "chunk" and rng.random() < 0.3:
            body.offset = rng.randrange(2**32)
    else:
        try:
            body.MergeFromString(_bytes(body.SerializeToString(), rng)) if rng.random() < 0.3 else (
                body.ParseFromString(_bytes(body.SerializeToString(), rng))
            )
        except Exception:  # no longer a message of that kind
            return None
    digest, found = blake3(), []
    for number, one in enumerate(parsed):
        if one.WhichOneof("body") in ("chunk", "group"):
            held = getattr(one, one.WhichOneof("body"))
            held.crc32c = google_crc32c.value(held.data)
        elif one.WhichOneof("body") in ("segment_end", "end"):
            getattr(one, one.WhichOneof("body")).digest = digest.digest()
        one.sequence = number
        found.append(one.SerializeToString())
        digest.update(found[-1])
    return found


def same(one: Held, other: Held) -> bool:
    """Whether two caches are the same to the last bit."""
    return one.cache.tokens == other.cache.tokens and all(
        torch.equal(a.keys, b.keys)
        and torch.equal(a.values, b.values)
        and torch.equal(a.positions, b.positions)
        for a, b in zip(one.cache.layers, other.cache.layers, strict=True)
    )


def _on_alarm(number: int, frame: object) -> None:
    raise HangError(f"longer than {HANG_S} s")


def run(sender: Sender, count: int, seed: int, on_step: Callable[[], None] = lambda: None) -> Report:
    """`count` damages as frames and as files, and a quarter as many forgeries."""
    receiver, rng, report = Receiver(sender.lm), random.Random(seed), Report()
    valid = transfers(sender)
    originals = {recipe: receiver.receive(frames) for recipe, frames in valid.items()}
    pool = [frame for frames in valid.values() for frame in frames]
    before = _peak_bytes()
    signal.signal(signal.SIGALRM, _on_alarm)
    for number in range(count + count // 4):
        recipe = rng.choice(RECIPES)
        what = f"{recipe}, mutation {number}, seed {seed}"
        if number >= count:
            changed = forged(valid[recipe], rng)
            held = _try(report, what, lambda c=changed: receiver.receive(c, LIMITS)) if changed else None
            report.forged += 1
            continue
        if rng.random() < 0.7:
            frames = damaged(valid[recipe], pool, rng)
            held = _try(report, what, lambda f=frames: receiver.receive(f, LIMITS))
        else:
            file = io.BytesIO()
            write_frames(valid[recipe], file)
            data = _bytes(file.getvalue(), rng)
            _try(report, what, lambda d=data: describe(io.BytesIO(d)) and None)
            held = _try(report, what, lambda d=data: receiver.read_file(io.BytesIO(d)))
        report.tried += 1
        if held is None:
            report.refused += 1
        elif same(held, originals[recipe]):
            report.identical += 1
        else:
            report.wrong.append(what)
        on_step()
    report.grown_bytes = _peak_bytes() - before
    return report


def _try(report: Report, what: str, work: Callable[[], Held | None]) -> Held | None:
    """What `work` gives; None where it is refused as it should be."""
    signal.alarm(HANG_S)
    try:
        return work()
    except KvlinkError as error:
        name = type(error).__name__
        report.by_error[name] = report.by_error.get(name, 0) + 1
    except Exception as error:
        report.other.append(f"{what}: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    return None


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
