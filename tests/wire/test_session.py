"""Two sessions joined by an imaginary wire; loss is not delivering.

The table of hostile mutations at the end names for each the exact error, and what must not happen:
nothing usable comes out of a session after it.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.agent.builder import restored
from kvlink.compress.codecs import CodecContext
from kvlink.compress.lossless import unpack_part
from kvlink.errors import (
    IntegrityError,
    KvlinkError,
    LimitError,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.session import (
    TRANSITIONS,
    GroupReceived,
    Limits,
    ManifestReceived,
    ReceiveSession,
    SegmentClosed,
    SegmentOpened,
    SendSession,
    TransferComplete,
    read_transfer,
)
from tests.wire.samples import TEXT, make_transfer

KV = ("raw", "lossless", "int8", "int4", "int3 coder=identity", "int1", "int4 svd=3", "int4 layers=1:int8")


def deliver(frames, limits=None):
    session = ReceiveSession(limits)
    return [event for frame in frames for event in session.receive(frame)], session


@pytest.mark.parametrize("recipe", KV)
@pytest.mark.parametrize("kept", [None, (0, 1, 5, 23)])
def test_what_is_sent_arrives(recipe, kept):
    manifest, frames, cache = make_transfer(recipe, kept)
    (opened, header, *groups, closed, complete), session = deliver(frames)
    assert opened == ManifestReceived(manifest)
    assert isinstance(header, SegmentOpened)
    assert [one.place.kind for one in groups] == ["map"] * (kept is not None) + ["layer", "layer"]
    assert (closed, complete) == (SegmentClosed(0), TransferComplete(1))
    assert session.state == "done"
    session.close()
    found = restored(read_transfer(frames)[1], manifest.shape, lambda _: CodecContext())
    assert found.tokens == 24
    assert [x.positions.tolist() for x in found.layers] == [x.positions.tolist() for x in cache.layers]


def test_a_text_arrives_as_text():
    manifest, frames, _ = make_transfer("text")
    (_, _, text, *_), _ = deliver(frames)
    assert isinstance(text, GroupReceived)
    assert unpack_part(text.group.parts[0]).decode() == TEXT


@pytest.mark.parametrize("chunk_bytes", [1, 7, 300, 100_000])
def test_chunk_size_changes_frames_but_not_what_arrives(chunk_bytes):
    _, frames, _ = make_transfer("int4", chunk_bytes=chunk_bytes)
    _, reference, _ = make_transfer("int4")
    assert deliver(frames)[0] == deliver(reference)[0]


def test_a_cut_transfer_continues_at_the_next_sequence_number():
    """For every cut point: what was delivered is not sent again, and the result is the same."""
    _, frames, _ = make_transfer("int8", chunk_bytes=200)
    whole = deliver(frames)[0]
    for cut in range(1, len(frames)):
        session = ReceiveSession()
        events = [event for frame in frames[:cut] for event in session.receive(frame)]
        assert session.next_sequence == cut
        events += [event for frame in frames[session.next_sequence :] for event in session.receive(frame)]
        assert events == whole


def test_a_transfer_that_ends_early_is_truncated_at_every_cut_point():
    _, frames, _ = make_transfer("int8", chunk_bytes=200)
    for cut in range(len(frames)):
        _, session = deliver(frames[:cut])
        with pytest.raises(TruncatedError, match="expected an end frame"):
            session.close()


def test_sender_and_receiver_use_the_same_table():
    states = {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values())
    assert states == {"start", "open", "segment", "done"}


def test_the_sender_cannot_leave_the_table_either():
    manifest, _, _ = make_transfer()
    session = SendSession(manifest)
    with pytest.raises(LocalProtocolError, match="end frame cannot follow in state start"):
        session.end()
    session.open()
    with pytest.raises(LocalProtocolError, match="manifest frame cannot follow in state open"):
        session.open()


def test_a_transfer_without_a_segment_is_refused():
    manifest, _, _ = make_transfer()
    session = SendSession(manifest)
    with pytest.raises(RemoteProtocolError, match="0 segments came"):
        deliver([session.open(), session.end()])


def test_a_session_takes_nothing_after_an_error():
    _, frames, _ = make_transfer()
    session = ReceiveSession()
    with pytest.raises(RemoteProtocolError):
        session.receive(frames[1])
    assert session.state == "failed"
    with pytest.raises(RemoteProtocolError, match="failed"):
        session.receive(frames[0])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_context_tokens=23), "at most 23 context tokens"),
        (Limits(max_cache_bytes=3000), "at most 3000 cache bytes"),
        (Limits(max_frame_bytes=0), "at most 0 bytes"),
        (Limits(max_segments=0), "at most 0 segments"),
        (Limits(max_frames=2), "frame 2: at most 2 frames"),
    ],
)
def test_limits_are_checked_before_anything_is_taken(limits, message):
    _, frames, _ = make_transfer("raw", chunk_bytes=4000)
    with pytest.raises(LimitError, match=message):
        deliver(frames, limits)


def edit(frame: bytes, change) -> bytes:
    message = pb.Frame.FromString(frame)
    change(message)
    return message.SerializeToString()


def _swap(frames, i, j):
    frames[i], frames[j] = frames[j], frames[i]


def _at(number, change):
    return lambda frames: frames.__setitem__(number, edit(frames[number], change))


def _set(path, value):
    def change(message):
        *parents, name = path.split(".")
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    return change


def _flip_data(message):
    data = bytearray(message.group.data)
    data[len(data) // 2] ^= 1
    message.group.data = bytes(data)


def _flip_and_fix_crc(message):
    import google_crc32c

    _flip_data(message)
    message.group.crc32c = google_crc32c.value(message.group.data)


# frames: 0 manifest, 1 header, 2 first group, 3 its chunk, …, -2 segment end, -1 end
HOSTILE = {
    "not protobuf": (lambda f: f.__setitem__(0, b"\xff" * 40), RemoteProtocolError, "frame 0: not a frame"),
    "empty frame": (lambda f: f.__setitem__(1, b""), RemoteProtocolError, "without a body"),
    "first frame missing": (lambda f: f.pop(0), RemoteProtocolError, "expected sequence 0, found 1"),
    "header missing": (lambda f: f.pop(1), RemoteProtocolError, "expected sequence 1, found 2"),
    "chunk missing": (lambda f: f.pop(3), RemoteProtocolError, "expected sequence 3, found 4"),
    "chunk twice": (lambda f: f.insert(3, f[2]), RemoteProtocolError, "expected sequence 3, found 2"),
    "chunks swapped": (lambda f: _swap(f, 2, 3), RemoteProtocolError, "expected sequence 2, found 3"),
    "manifest twice": (
        lambda f: f.__setitem__(1, edit(f[0], _set("sequence", 1))),
        RemoteProtocolError,
        "manifest frame cannot follow in state open",
    ),
    "end before the segment": (
        lambda f: f.__setitem__(1, edit(f[-1], _set("sequence", 1))),
        IntegrityError,
        "frame 1: digest",
    ),
    "frames after the end": (
        lambda f: f.append(edit(f[1], _set("sequence", len(f)))),
        RemoteProtocolError,
        "cannot follow in state done",
    ),
    "bit flip in a chunk": (
        _at(2, _flip_data),
        IntegrityError,
        "frame 2: bytes at offset 0: expected crc32c",
    ),
    "bit flip with its crc mended": (_at(2, _flip_and_fix_crc), IntegrityError, "digest of all frames"),
    "offset moved": (_at(3, _set("chunk.offset", 5)), RemoteProtocolError, "expected offset 300, found 5"),
    "empty chunk": (_at(3, _set("chunk.data", b"")), RemoteProtocolError, "no bytes"),
    "chunk too long": (_at(3, _set("chunk.data", b"x" * 9999)), RemoteProtocolError, "bytes, more come"),
    "empty group": (_at(2, _set("group.data", b"")), RemoteProtocolError, "no bytes"),
    "group too long": (_at(2, _set("group.data", b"x" * 9999)), RemoteProtocolError, "bytes, more come"),
    "group before the one before is whole": (
        lambda f: f.__setitem__(3, edit(f[2], _set("sequence", 3))),
        RemoteProtocolError,
        "before the one before it is whole",
    ),
    "segment ends early": (
        lambda f: f.__setitem__(2, edit(f[-2], _set("sequence", 2))),
        RemoteProtocolError,
        "2 groups have not come",
    ),
    "segment digest": (
        _at(-2, _set("segment_end.digest", b"\0" * 32)),
        IntegrityError,
        "the frame says 0000",
    ),
    "end digest": (_at(-1, _set("end.digest", b"\0" * 32)), IntegrityError, "the frame says 0000"),
    "end counts wrong": (_at(-1, _set("end.segments", 2)), RemoteProtocolError, "the end names 2"),
    "other version": (
        _at(0, _set("manifest.protocol_version", 2)),
        RemoteProtocolError,
        "expected 1, found 2",
    ),
    "short transfer id": (
        _at(0, _set("manifest.transfer_id", b"t")),
        RemoteProtocolError,
        "manifest.transfer_id",
    ),
    "short digest": (
        _at(0, _set("manifest.context_digest", b"t")),
        RemoteProtocolError,
        "manifest.context_digest",
    ),
    "short fingerprint": (
        _at(0, _set("manifest.fingerprint.rotary", b"t")),
        RemoteProtocolError,
        "fingerprint.rotary",
    ),
    "empty sketch": (
        _at(0, lambda m: m.manifest.sketch.SetInParent()),
        RemoteProtocolError,
        "manifest.sketch.layers: expected",
    ),
    "long sketch": (
        _at(0, lambda m: m.manifest.sketch.MergeFrom(pb.Sketch(layers=2, numbers=[1] * 100_000))),
        RemoteProtocolError,
        "numbers: expected at most 80 entries",
    ),
    "sketch of huge numbers": (
        _at(0, lambda m: m.manifest.sketch.MergeFrom(pb.Sketch(layers=1, numbers=[-(2**31)] * 10))),
        RemoteProtocolError,
        "manifest.sketch.numbers: .* found -2147483648 at 0",
    ),
    "mode against recipe": (_at(0, _set("manifest.mode", pb.MODE_TEXT)), RemoteProtocolError, "does not fit"),
    "unknown mode": (_at(0, _set("manifest.mode", 77)), RemoteProtocolError, "manifest.mode: .* found 77"),
    "no layers": (_at(0, _set("manifest.shape.layers", 0)), RemoteProtocolError, "shape.layers"),
    "huge head": (_at(0, _set("manifest.shape.head_size", 2**30)), RemoteProtocolError, "shape.head_size"),
    "huge shape": (_at(0, _set("manifest.shape.tokens", 2**20)), LimitError, "context tokens"),
    "unknown dtype": (_at(0, _set("manifest.shape.dtype", 9)), RemoteProtocolError, "shape.dtype"),
    "whole layer twice": (
        _at(0, lambda m: [m.manifest.shape.whole_layers.add(layer=1, held_tokens=3) for _ in range(2)]),
        RemoteProtocolError,
        "whole_layers",
    ),
    "whole layer too long": (
        _at(0, lambda m: m.manifest.shape.whole_layers.add(layer=1, held_tokens=25)),
        RemoteProtocolError,
        "held tokens",
    ),
    "many layers": (_at(0, _set("manifest.shape.layers", 5000)), RemoteProtocolError, "shape.layers"),
    "prompt of no text": (_at(0, _set("manifest.prompt.before", b"\xff")), RemoteProtocolError, "not UTF-8"),
    "bits of 5": (
        _at(0, _set("manifest.recipe.codec.quantized.keys.bits", 5)),
        RemoteProtocolError,
        "bits must be",
    ),
    "nan retention": (
        _at(0, _set("manifest.recipe.selection.amount.value", float("nan"))),
        RemoteProtocolError,
        "amount.value: .* found nan",
    ),
    "unknown retention unit": (
        _at(0, _set("manifest.recipe.selection.amount.unit", 99)),
        RemoteProtocolError,
        "amount.unit",
    ),
    "other recipe than coded": (
        _at(0, _set("manifest.recipe.codec.quantized.keys.bits", 8)),
        RemoteProtocolError,
        "is not of the recipe",
    ),
    "segment index": (_at(1, _set("segment_header.index", 3)), RemoteProtocolError, "expected segment 0"),
    "text segment in kv": (
        _at(1, lambda m: (m.segment_header.text.SetInParent(), m.segment_header.ClearField("codec"))),
        RemoteProtocolError,
        "adds text in a transfer of mode kv",
    ),
    "adds nothing": (
        _at(1, lambda m: m.segment_header.ClearField("positions")),
        RemoteProtocolError,
        "a segment adds positions, a refinement or a text",
    ),
    "no codec": (
        _at(1, lambda m: m.segment_header.ClearField("codec")),
        RemoteProtocolError,
        "names its codec",
    ),
    "another codec than the recipe's": (
        _at(1, _set("segment_header.codec.quantized.keys.bits", 8)),
        RemoteProtocolError,
        "is not of the recipe",
    ),
    "a refinement of nothing": (
        _at(1, lambda m: setattr(m.segment_header.refinement, "kept", 3)),
        RemoteProtocolError,
        "kept must be",
    ),
    "sliding layers that are none": (
        _at(1, _set("segment_header.positions.sliding", True)),
        RemoteProtocolError,
        "sliding window come in the first segment",
    ),
    "keeps nothing": (_at(1, _set("segment_header.positions.kept", 0)), RemoteProtocolError, "kept must be"),
    "keeps too much": (
        _at(1, _set("segment_header.positions.kept", 25)),
        RemoteProtocolError,
        "kept must be",
    ),
    "map sets": (_at(1, _set("segment_header.positions.map_sets", 1)), RemoteProtocolError, "position sets"),
    "scale widths": (
        _at(2, _set("group.scale_bytes", b"\3" * 2)),
        RemoteProtocolError,
        "scale widths",
    ),
    "a part too few": (
        _at(2, lambda m: m.group.parts.pop()),
        RemoteProtocolError,
        "expected 4 parts, found 3",
    ),
    "a part too large": (
        _at(2, lambda m: setattr(m.group.parts[1], "coded_bytes", 2**60)),
        RemoteProtocolError,
        "coded ones",
    ),
    "unknown coder": (
        _at(2, lambda m: setattr(m.group.parts[1], "coder", 9)),
        RemoteProtocolError,
        "unknown coder 9",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_transfers_are_refused_by_name(name):
    mutate, error, message = HOSTILE[name]
    _, frames, _ = make_transfer("int4")
    assert len(frames) > 5
    mutate(frames)
    session = ReceiveSession(Limits(max_context_tokens=10_000))
    usable = []
    with pytest.raises(error, match=message):
        for frame in frames:
            usable += [e for e in session.receive(frame) if isinstance(e, TransferComplete)]
    assert session.state == "failed"
    assert not usable or name == "frames after the end"


@given(st.data())
def test_any_single_byte_changed_is_refused_or_changes_nothing(data):
    """Frames are covered by a chained digest: one changed byte never gets through silently."""
    _, frames, _ = make_transfer("int4", layers=1, tokens=6)
    number = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[number]) - 1))
    value = data.draw(st.integers(1, 255))
    changed = bytearray(frames[number])
    changed[at] ^= value
    frames[number] = bytes(changed)
    with pytest.raises(KvlinkError):
        deliver(frames)


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_arbitrary_bytes_raise_only_errors_of_the_package(chunks):
    session = ReceiveSession()
    for chunk in chunks:
        with pytest.raises(KvlinkError):
            session.receive(chunk)
