"""A transfer that was cut: what had closed by then makes a cache, and says how much of the context it is."""

from __future__ import annotations

import io

import pytest
import torch

from kvlink.agent.builder import restored
from kvlink.agent.receiver import Held, Receiver
from kvlink.agent.sender import Sender
from kvlink.compress.codecs import CodecContext
from kvlink.errors import IntegrityError, TruncatedError
from kvlink.wire.file import write_frames
from kvlink.wire.session import ReceiveSession, read_transfer
from tests.agent.conftest import QUESTION, TEXT

TIERS = "q2c@0.5 int8 rest=int2"


@pytest.fixture(scope="module")
def lm(random_lm):
    return random_lm("qwen2", "bfloat16")


@pytest.fixture(scope="module")
def transfer(lm):
    sender = Sender(lm, chunk_bytes=4096)
    return sender.pack(sender.read(TEXT), QUESTION, TIERS)


def closed_in(frames) -> list[int]:
    """Segments that have closed after each frame."""
    session, found = ReceiveSession(keep=False), []
    for frame in frames:
        session.receive(frame)
        found.append(len(session.closed))
    return found


def share_of(held: Held) -> float:
    layers = held.cache.layers
    return sum(layer.positions.shape[1] / held.cache.tokens for layer in layers) / len(layers)


def test_at_every_cut_the_cache_is_that_of_the_closed_segments(lm, transfer):
    manifest, segments = read_transfer(transfer.frames)
    receiver, expected = Receiver(lm), {}
    for count in (1, 2):
        expected[count] = restored(segments[:count], manifest.shape, lambda _: CodecContext())
    for cut, closed in enumerate(closed_in(transfer.frames), 1):
        frames = transfer.frames[:cut]
        if cut < len(transfer.frames):
            with pytest.raises(TruncatedError):
                receiver.receive(frames)
        if not closed:
            with pytest.raises(TruncatedError):
                receiver.receive(frames, partial=True)
            continue
        held = receiver.receive(frames, partial=True)
        for found, wanted in zip(held.cache.layers, expected[closed].layers, strict=True):
            assert torch.equal(found.keys, wanted.keys)
            assert torch.equal(found.positions, wanted.positions)
        receipt = held.receipt
        assert receipt.segments == closed
        assert receipt.kept_share == pytest.approx(share_of(held))
        assert receipt.kept_tokens == transfer.receipt.kept_tokens, "the background is not of the selection"
        assert receipt.wire_bytes == sum(map(len, frames))
        assert receipt.bytes["framing"] < 60 * cut, (
            "bytes of a group that is not whole are counted by their kind"
        )
        assert receiver.answer(held, QUESTION).text is not None
    assert held.receipt.kept_share == 1


def test_what_both_ends_say_of_a_whole_transfer_is_the_same(lm, transfer):
    found, told = Receiver(lm).receive(transfer.frames).receipt, transfer.receipt
    for name in ("kept_tokens", "kept_share", "segments", "bytes"):
        assert getattr(found, name) == getattr(told, name), name


@pytest.mark.parametrize("recipe", ["int8", "text", "q2c@0.5 int4", "q2c@0.5 int4 scope=head"])
def test_the_share_that_is_kept_is_told_by_both(lm, recipe):
    sender = Sender(lm)
    transfer = sender.pack(sender.read(TEXT), QUESTION, recipe)
    held = Receiver(lm).receive(transfer.frames)
    assert held.receipt.kept_share == transfer.receipt.kept_share == pytest.approx(share_of(held))


def test_a_file_that_ends_inside_a_frame_is_read_as_far_as_it_closed(lm, transfer):
    out = io.BytesIO()
    write_frames(transfer.frames[: closed_in(transfer.frames).index(1) + 3], out)
    torn = out.getvalue()[:-7]
    receiver = Receiver(lm)
    with pytest.raises(TruncatedError):
        receiver.read_file(io.BytesIO(torn))
    assert receiver.read_file(io.BytesIO(torn), partial=True).receipt.segments == 1


def test_only_a_cut_is_forgiven(lm, transfer):
    """A wrong byte behind a closed segment is a wrong byte."""
    at = closed_in(transfer.frames).index(1) + 3
    frames = list(transfer.frames)
    frames[at] = frames[at][:-1] + bytes([frames[at][-1] ^ 1])
    with pytest.raises(IntegrityError):
        Receiver(lm).receive(frames, partial=True)
