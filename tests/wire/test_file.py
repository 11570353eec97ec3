"""The `.kvl` file: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.errors import KvlinkError, LimitError, RemoteProtocolError, TruncatedError
from kvlink.wire.file import MAGIC, read_frames, write_frames
from kvlink.wire.inspect import describe
from tests.wire.samples import make_transfer


def packed(frames) -> bytes:
    out = io.BytesIO()
    count = write_frames(frames, out)
    assert count == len(out.getvalue())
    return out.getvalue()


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_frames_round_trip(frames):
    assert list(read_frames(io.BytesIO(packed(frames)))) == frames


def test_every_truncation_is_noticed():
    _, frames, _ = make_transfer("int4")
    data = packed(frames)
    for cut in range(len(data)):
        with pytest.raises((TruncatedError, RemoteProtocolError)):
            describe(io.BytesIO(data[:cut]))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", RemoteProtocolError, "not a .kvl file"),
        (b"PK\x03\x04 a zip file", RemoteProtocolError, "not a .kvl file"),
        (MAGIC.replace(b"\r\n", b"\n") + b"\0" * 9, RemoteProtocolError, "not a .kvl file"),
        (MAGIC + b"\x01", TruncatedError, "in its head"),
        (MAGIC + struct.pack("<I", 2), RemoteProtocolError, "expected 1, found 2"),
        (MAGIC + struct.pack("<III", 1, 2**31, 0), LimitError, "frame 0: at most"),
        (MAGIC + struct.pack("<II", 1, 10) + b"abc", TruncatedError, "ends after 3"),
    ],
)
def test_other_files_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        list(read_frames(io.BytesIO(data)))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_errors_of_the_package(data):
    for prefix in (b"", MAGIC + struct.pack("<I", 1)):
        with pytest.raises(KvlinkError):
            describe(io.BytesIO(prefix + data))


def test_inspect_tells_every_byte():
    manifest, frames, _ = make_transfer("int4", kept=(0, 3, 9))
    told = describe(io.BytesIO(packed(frames)))
    assert told["frame_bytes"] == sum(map(len, frames)) == sum(told["bytes"].values())
    assert told["kept_tokens"] == 3
    assert told["context_tokens"] == 24
    assert told["recipe_full"] == str(manifest.recipe)
