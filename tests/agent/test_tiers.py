"""Within a deadline positions come in tiers, the most needed first: each that has closed is the best of its size."""

from __future__ import annotations

import pytest
import torch

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.cache import Evidence
from kvlink.compress.select import choose_positions, in_tiers
from kvlink.errors import DeadlineError, RecipeError, RemoteProtocolError
from kvlink.payload import CacheShape
from kvlink.recipe import Target
from kvlink.selection import Amount, Selection
from kvlink.wire.session import ReceiveSession
from tests.agent.conftest import QUESTION, TEXT

HURRY = Target(deadline_s=3600)
SHAPE = CacheShape(3, 2, 64, 8, "bfloat16")


def evidence(seed: int = 0) -> Evidence:
    found = torch.rand(3, 2, 64, generator=torch.Generator().manual_seed(seed))
    return Evidence(question=found, question_tokens=3)


@pytest.fixture(scope="module")
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"), chunk_bytes=4096)


@pytest.fixture(scope="module")
def context(sender):
    return sender.read(TEXT)


def after_each_segment(frames) -> list[tuple[bytes, ...]]:
    session, found = ReceiveSession(keep=False), []
    for number, frame in enumerate(frames, 1):
        session.receive(frame)
        if len(session.closed) > len(found):
            found.append(tuple(frames[:number]))
    return found


class TestOrder:
    @pytest.mark.parametrize("scope", ["shared", "head"])
    @pytest.mark.parametrize("count", [1, 5, 13, 40, 64])
    def test_the_first_tiers_are_what_a_smaller_selection_would_choose(self, scope, count):
        """The oracle is the selection itself: after tiers of n positions there are the n that it chooses."""
        selection = Selection("q2c", Amount(count, "count"), scope=scope)
        positions = choose_positions(evidence(), selection, SHAPE)
        tiers = in_tiers(positions, evidence(), selection, SHAPE)
        there = 0
        for number, tier in enumerate(tiers):
            there += tier.shape[-1]
            best = choose_positions(evidence(), Selection("q2c", Amount(there, "count"), scope=scope), SHAPE)
            so_far = torch.cat(tiers[: number + 1], -1).sort(-1).values
            assert torch.equal(so_far, best)
            assert bool((tier.diff() > 0).all())
        assert there == positions.shape[-1]

    def test_sinks_and_recent_tokens_are_in_the_first(self):
        selection = Selection("q2c", Amount(40, "count"))
        (first, *_) = in_tiers(choose_positions(evidence(), selection, SHAPE), evidence(), selection, SHAPE)
        assert {0, 1, 2, 3, *range(56, 64)} <= set(first.tolist())


@pytest.mark.parametrize("recipe", ["q2c@0.5 raw", "q2c+draft@0.5 raw", "q2c@0.5 raw scope=head"])
def test_every_cut_after_a_segment_is_the_transfer_of_a_smaller_selection(sender, context, recipe):
    frames = sender.pack(context, QUESTION, recipe, HURRY).frames
    receiver, cuts = Receiver(sender.lm), after_each_segment(frames)
    assert len(cuts) > 2
    for cut in cuts:
        held = receiver.receive(cut, partial=True)
        smaller = recipe.replace("@0.5", f"@{held.receipt.kept_tokens}tok")
        expected = receiver.receive(sender.pack(context, QUESTION, smaller).frames)
        for found, wanted in zip(held.cache.layers, expected.cache.layers, strict=True):
            assert torch.equal(found.positions, wanted.positions)
            assert torch.equal(found.keys, wanted.keys)
            assert torch.equal(found.values, wanted.values)
        assert held.receipt.kept_share == pytest.approx(expected.receipt.kept_share)


@pytest.mark.parametrize("question", [QUESTION, ""])
def test_a_recipe_of_all_positions_comes_in_tiers_too_and_whole_at_the_end(sender, context, question):
    """By the question; without one the sinks and the last tokens come first."""
    transfer = sender.pack(context, question, "int8", HURRY)
    plain = sender.pack(context, question, "int8")
    receiver = Receiver(sender.lm)
    shares = [
        receiver.receive(cut, partial=True).receipt.kept_share for cut in after_each_segment(transfer.frames)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1
    assert str(transfer.manifest.recipe) == str(plain.manifest.recipe)
    assert receiver.receive(transfer.frames).receipt.kept_tokens == plain.receipt.kept_tokens


def test_a_background_is_the_last_tier(sender, context):
    transfer = sender.pack(context, QUESTION, "q2c@0.5 int8 rest=int2", HURRY)
    held = [Receiver(sender.lm).receive(cut, partial=True) for cut in after_each_segment(transfer.frames)]
    assert [one.receipt.kept_share == 1 for one in held] == [False] * (len(held) - 1) + [True]
    assert held[-1].receipt.kept_tokens == held[-2].receipt.kept_tokens == transfer.receipt.kept_tokens


@pytest.mark.parametrize("recipe", ["int8", "q2c@0.5 int8"])
def test_without_a_deadline_the_segments_stay_as_they_are(sender, context, recipe):
    assert sender.pack(context, QUESTION, recipe).receipt.segments == 1
    assert sender.pack(context, QUESTION, recipe).manifest.deadline_ms == 0


def test_the_manifest_says_what_is_left_of_the_deadline(sender, context):
    told = sender.pack(context, QUESTION, "int8", HURRY).manifest.deadline_ms
    assert 3_000_000 < told < 3_600_000


def test_a_deadline_that_is_over_before_a_frame_can_leave_is_an_error(sender, context):
    with pytest.raises(DeadlineError, match="before the first frame could leave"):
        sender.pack(context, QUESTION, "q2c+draft@0.5 int8", Target(deadline_s=1e-4))


def test_a_budget_counts_the_tiers_too(sender, context):
    full = sender.pack(context, QUESTION, "int8").receipt.wire_bytes
    found = sender.pack(context, QUESTION, "int8", Target(budget_bytes=full // 2, deadline_s=3600))
    assert found.receipt.wire_bytes <= full // 2
    assert found.receipt.segments > 2


@pytest.mark.parametrize(
    "asked",
    [{"deadline_s": -1.0}, {"deadline_s": 3601.0}, {"deadline_s": float("nan")}, {"allow_text": True}],
)
def test_a_deadline_that_cannot_be_is_refused(asked):
    with pytest.raises(RecipeError, match="deadline"):
        Target(**asked)


class TestReceipts:
    """What a sender says of a transfer that was enough: what it sent, and what had closed of it."""

    def test_bytes_are_those_sent_and_positions_those_that_have_closed(self, sender, context):
        transfer = sender.pack(context, QUESTION, "q2c@0.5 int8", HURRY)
        first, second, *_ = after_each_segment(transfer.frames)
        taken, sent = len(first) + 2, len(second) - 1
        found = transfer.receipt_until(sent, taken)
        held = Receiver(sender.lm).receive(first, partial=True).receipt
        for name in ("segments", "kept_tokens", "kept_share", "cache_digest"):
            assert getattr(found, name) == getattr(held, name), name
        assert found.wire_bytes == sum(map(len, transfer.frames[:sent]))
        assert found.wire_bytes < transfer.receipt.wire_bytes

    def test_of_what_has_not_closed_nobody_can_have_enough(self, sender, context):
        transfer = sender.pack(context, QUESTION, "q2c@0.5 int8", HURRY)
        short = len(after_each_segment(transfer.frames)[0]) - 1
        with pytest.raises(
            RemoteProtocolError, match=f"enough of {short} frames, in which no segment closes"
        ):
            transfer.receipt_until(len(transfer.frames), short)

    @pytest.mark.parametrize("recipe", ["q2c+draft@0.5 int8", "int8", "q2c@0.5 int8 rest=int2"])
    def test_the_explanation_shows_what_was_there(self, sender, context, recipe):
        transfer = sender.pack(context, QUESTION, recipe, HURRY)
        (first, *_) = after_each_segment(transfer.frames)
        held = Receiver(sender.lm).receive(first, partial=True)
        told = sender.explain(context, QUESTION, transfer, held.receipt)
        there = torch.zeros(context.cache.tokens)
        there[held.cache.layers[0].positions[0]] = 1
        assert told.kept == tuple(there.tolist())
