"""A small file that would become gigabytes is refused before it does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import zstandard

from kvlink.agent.receiver import Intake, Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import LimitError
from kvlink.payload import Part, Segment
from kvlink.wire.file import write_frames
from kvlink.wire.session import SendSession, read_transfer

GIGABYTES = 4_000_000_000

READ = """
import json, resource, sys
from kvlink.agent.receiver import Receiver
from kvlink.errors import KvlinkError
receiver = Receiver()
small = receiver.read_file(open(sys.argv[1], "rb"))     # the way is warm
data = open(sys.argv[2], "rb").read()
import io
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    receiver.read_file(io.BytesIO(data))
    said = "taken"
except KvlinkError as error:
    said = f"{type(error).__name__}: {error}"
print(json.dumps([said, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


def bomb(declared: int | None) -> bytes:
    """About 1 MB of zstd that becomes gigabytes; what its head declares."""
    piece = bytes(64_000_000)
    out = io.BytesIO()
    size = {"size": GIGABYTES} if declared is None else {"size": declared}
    if declared is not None and declared < 0:
        size = {}
    with zstandard.ZstdCompressor(level=1).stream_writer(out, closefd=False, **size) as writer:
        for _ in range(GIGABYTES // len(piece)):
            writer.write(piece)
        writer.write(bytes(GIGABYTES % len(piece)))
    return out.getvalue()


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    honest, silent = bomb(None), bomb(-1)
    return {"declares gigabytes": honest, "declares nothing": silent}


def forged(sender: Sender, data: bytes, side: str) -> bytes:
    """A `.kvl` file whose checksums are right and one of whose parts is the bomb."""
    transfer = sender.pack(sender.read("Mira Dosh was born in Tavik. " * 40), "Where?", side)
    manifest = transfer.manifest
    if side == "text":
        plain = 20_000  # what the window can hold
        manifest = replace(manifest, text_bytes=plain)
        segment = Segment.of_text(Part("text", "zstd", plain, data[:plain]))
    else:
        _, (segment,) = read_transfer(transfer.frames)
        first = segment.groups[0]
        codes = max(range(len(first.parts)), key=lambda i: first.parts[i].plain_bytes)
        plain = first.parts[codes].plain_bytes
        parts = list(first.parts)
        parts[codes] = Part("codes", "zstd", plain, data[:plain])
        segment = replace(segment, groups=(replace(first, parts=tuple(parts)), *segment.groups[1:]))
    out = io.BytesIO()
    write_frames(SendSession(manifest).transfer([segment]), out)
    return out.getvalue()


@pytest.mark.parametrize("side", ["text", "int8"])
@pytest.mark.parametrize("kind", ["declares gigabytes", "declares nothing"])
def test_a_bomb_is_refused_and_takes_no_memory(tiny, bombs, tmp_path, side, kind):
    sender = Sender(tiny)
    small, big = tmp_path / "small.kvl", tmp_path / "big.kvl"
    with small.open("wb") as out:
        sender.pack(sender.read("Mira Dosh was born in Tavik. " * 40), "Where?", side).write(out)
    big.write_bytes(forged(sender, bombs[kind], side))
    assert big.stat().st_size < 2_000_000
    run = subprocess.run(
        [sys.executable, "-c", READ, str(small), str(big)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said, grown = json.loads(run.stdout)
    assert said.startswith(("CodecError", "RemoteProtocolError")), said
    assert grown < 50_000_000


def test_a_text_that_no_window_holds_is_refused_by_its_manifest(tiny):
    """Two kB that claim 16 MB of text: the manifest is as far as they come."""
    sender, receiver = Sender(tiny), Receiver(tiny)
    plain = b"Jand Faris was born in Nibo. " * 550_000
    manifest = replace(sender.pack(sender.read("Nothing."), "", "text").manifest, text_bytes=len(plain))
    packed = zstandard.ZstdCompressor().compress(plain)
    segment = Segment.of_text(Part("text", "zstd", len(plain), packed))
    frames = list(SendSession(manifest).transfer([segment]))
    assert sum(map(len, frames)) < 3000
    intake = Intake(tiny)
    with pytest.raises(LimitError, match="the model's window 2048 holds at most"):
        intake.take(frames[0])
    with pytest.raises(LimitError):
        receiver.receive(frames)
