"""Transfers written by earlier releases decode to what they always did; kept for ever.

`scripts/make_vectors.py` adds vectors and never changes one.
"""

from __future__ import annotations

import io
import json

import pytest

from kvlink.agent.builder import restored
from kvlink.compress.lossless import unpack_part
from kvlink.errors import KvlinkError
from kvlink.wire.file import read_frames, write_frames
from kvlink.wire.inspect import describe, listing
from kvlink.wire.session import ReceiveSession, diagram, read_transfer
from tests.wire.vectors import FOLDER, ROOT, frames_of, make_vectors

EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_kept_vectors_decode_to_what_they_always_did(name):
    manifest, segments = read_transfer(frames_of(name))
    if manifest.mode == "text":
        assert unpack_part(segments[0].groups[0].parts[0]).decode() == EXPECTED[name]
        return
    cache = restored(segments, manifest.shape, lambda _: make_vectors.known())
    told = make_vectors.digest(cache, manifest.recipe)
    if isinstance(told, float):
        assert told == pytest.approx(EXPECTED[name], rel=1e-3)
    else:
        assert told == EXPECTED[name]


def test_every_vector_is_listed_and_every_recipe_has_one():
    assert {p.stem for p in FOLDER.glob("*.kvl")} == set(EXPECTED) == set(make_vectors.VECTORS)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_listing_covers_every_byte(name):
    data = (FOLDER / f"{name}.kvl").read_bytes()
    lines = list(listing(io.BytesIO(data)))
    offsets = [int(line.split()[0]) for line in lines]
    assert offsets == sorted(set(offsets))
    assert offsets[0] == 0
    assert describe(io.BytesIO(data))["frames"] == sum("length of frame" in line for line in lines)


def test_the_documentation_shows_the_table_and_the_vector_as_they_are():
    text = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
    assert diagram() in text
    with (FOLDER / "text.kvl").open("rb") as stream:
        assert "\n".join(listing(stream)) in text


def test_a_file_is_written_as_it_was_read():
    data = (FOLDER / "int8.kvl").read_bytes()
    out = io.BytesIO()
    write_frames(read_frames(io.BytesIO(data)), out)
    assert out.getvalue() == data


@pytest.mark.parametrize("name", ["int4-kept", "transform-tiers", "text"])
def test_every_single_flipped_bit_of_a_file_is_refused_and_says_where(name):
    data = (FOLDER / f"{name}.kvl").read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        session = ReceiveSession()
        with pytest.raises(KvlinkError, match=r"frame \d+|\.kvl|transfer ends"):
            for frame in read_frames(io.BytesIO(bytes(flipped))):
                session.receive(frame)
            session.close()
