"""Transfers that add to what a receiver holds: another question, finer positions, a context that has grown.

The oracle: the cache that comes out is the one that the same positions make in a transfer of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvlink.agent.context import Context
from kvlink.agent.plan import Delivered, delivered, plan, plan_missing
from kvlink.agent.receiver import Held, Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.settings import ReceiverSettings
from kvlink.cache import KVCache
from kvlink.compress.codec import encode
from kvlink.errors import (
    CodecError,
    ContextError,
    IdentityError,
    NotFoundError,
    RecipeError,
    RemoteProtocolError,
)
from kvlink.recipe import Recipe
from kvlink.transport.api import Fetch
from kvlink.wire.session import SendSession, read_transfer
from tests.agent.conftest import QUESTION, TEXT, answer, feed
from tests.segments import decoded
from tests.wire.samples import make_cache

OTHER = "Who carried the crates?"
MORE = "The ice came in April, and nobody sold fish until it was gone. "
RECIPES = ("q2c@0.3 raw", "q2c@0.3 raw scope=head", "q2c+draft@0.25 transform=0.5 rest=2", "q2c@0.25 int4")


@pytest.fixture(scope="module")
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "float32"))


@pytest.fixture(scope="module")
def receiver(sender) -> Receiver:
    return Receiver(sender.lm)


@pytest.fixture
def context(sender) -> Context:
    return sender.read(TEXT)


def take(
    receiver: Receiver, sender: Sender, context: Context, question: str, recipe: str, base: Held | None = None
):
    """Pack and take a transfer, which adds to `base`; what is held, and the transfer."""
    named = bytes.fromhex(base.receipt.cache_digest) if base else b""
    transfer = sender.pack(context, question, recipe, base=named)
    return receiver.receive(transfer.frames, base=base), transfer


def sets_of(cache: KVCache) -> list[list[list[int]]]:
    return [layer.positions.tolist() for layer in cache.layers]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_question_moves_only_what_is_missing(sender, receiver, context, recipe):
    first, whole = take(receiver, sender, context, QUESTION, recipe)
    second, added = take(receiver, sender, context, OTHER, recipe, first)
    fresh, alone = take(receiver, sender, context, OTHER, recipe)
    assert added.manifest.base is not None
    assert added.receipt.bytes["codes"] < whole.receipt.bytes["codes"]
    assert added.receipt.cache_digest == second.receipt.cache_digest != first.receipt.cache_digest
    assert second.receipt.kept_share >= first.receipt.kept_share
    for index, (old, new, own) in enumerate(
        zip(first.cache.layers, second.cache.layers, fresh.cache.layers, strict=True)
    ):
        for head in range(old.keys.shape[0]):
            before, after = set(old.positions[head].tolist()), set(new.positions[head].tolist())
            assert before <= after
            if "scope=head" not in recipe and "rest" not in recipe:
                assert after == before | set(own.positions[head].tolist()), (index, head)
    assert receiver.answer(second, OTHER, max_new_tokens=4).text is not None


def test_positions_that_a_fresh_transfer_has_are_the_same_numbers(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 raw")
    second, _ = take(receiver, sender, context, OTHER, "q2c@0.3 raw", first)
    for layer, full in zip(second.cache.layers, context.cache.layers, strict=True):
        at = layer.positions[..., None].expand(-1, -1, layer.keys.shape[-1])
        assert torch.equal(layer.keys, full.keys.gather(1, at))
        assert torch.equal(layer.values, full.values.gather(1, at))


def test_with_a_background_the_positions_of_the_second_question_become_finer(sender, receiver, context):
    recipe = "q2c+draft@0.25 transform=0.5 rest=2"
    first, _ = take(receiver, sender, context, QUESTION, recipe)
    second, added = take(receiver, sender, context, OTHER, recipe, first)
    _, segments = read_transfer(added.frames)
    assert [segment.header.adds for segment in segments] == ["refinement"]
    assert added.receipt.kept_tokens == second.receipt.kept_tokens == segments[0].header.kept > 0
    assert not added.receipt.is_text
    assert sets_of(second.cache) == sets_of(first.cache) == sets_of(context.cache)

    def error(cache: KVCache) -> float:
        pairs = zip(cache.layers, context.cache.layers, strict=True)
        return float(sum((one.values - full.values).square().sum() for one, full in pairs))

    assert error(second.cache) < error(first.cache)


def test_the_same_question_again_moves_nothing_and_is_the_same_cache(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 int8")
    again, added = take(receiver, sender, context, QUESTION, "q2c@0.3 int8", first)
    assert added.receipt.segments == added.receipt.kept_tokens == 0
    assert not added.receipt.is_text
    assert added.receipt.cache_digest == first.receipt.cache_digest
    for one, other in zip(first.cache.layers, again.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert one.keys.data_ptr() != other.keys.data_ptr(), "whoever holds the first may wipe it"


def test_all_positions_after_some_bring_the_others(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 raw")
    rest, added = take(receiver, sender, context, "", "raw", first)
    assert rest.receipt.kept_share == 1
    for layer, full in zip(rest.cache.layers, context.cache.layers, strict=True):
        assert torch.equal(layer.keys, full.keys)
    assert added.receipt.bytes.get("map", 0) == 0, "they are all that are missing"


@pytest.mark.parametrize("recipe", ["raw", "q2c@0.3 raw", "q2c@0.3 raw scope=head", "q2c@0.25 raw rest=int8"])
def test_a_context_that_has_grown_moves_its_new_tokens(sender, receiver, context, recipe):
    first, _ = take(receiver, sender, context, QUESTION, recipe)
    longer = sender.extend(context, MORE)
    assert longer.ids[: len(context.ids)] == context.ids
    next_turn, added = take(receiver, sender, longer, OTHER, recipe, first)
    assert added.manifest.base is not None
    assert added.manifest.base.tokens == len(context.ids)
    assert next_turn.cache.tokens == len(longer.ids)
    new = set(range(len(context.ids), len(longer.ids)))
    for layer, full in zip(next_turn.cache.layers, longer.cache.layers, strict=True):
        assert all(new <= set(row) for row in layer.positions.tolist())
        at = layer.positions[..., None].expand(-1, -1, layer.keys.shape[-1])
        if "rest" not in recipe:
            assert torch.equal(layer.keys, full.keys.gather(1, at))
    whole = sender.pack(longer, OTHER, recipe)
    assert added.receipt.wire_bytes < whole.receipt.wire_bytes


def test_reading_on_is_reading_at_once(sender):
    context = sender.read(TEXT)
    longer = sender.extend(context, MORE)
    at_once = sender.read(f"{TEXT}\n{MORE}")
    assert longer.ids == at_once.ids
    assert longer.text == at_once.text
    for one, other in zip(longer.cache.layers, at_once.cache.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4)
    assert len(context.ids) == context.cache.tokens, "the shorter one stays as it is"


def test_what_no_text_is_cut_into_has_no_text_of_its_own(sender, context, monkeypatch):
    whole = sender.lm.context_ids(TEXT)
    monkeypatch.setattr(type(sender.lm), "context_ids", lambda *_: whole[::-1])
    longer = sender.extend(context, MORE)
    assert longer.ids[: len(context.ids)] == context.ids
    with pytest.raises(RecipeError, match="no text"):
        sender.pack(longer, QUESTION, "text")
    with pytest.raises(ContextError, match="nothing to extend"):
        sender.extend(context, "  ")


def test_a_chain_of_bases(sender, receiver, context):
    held, _ = take(receiver, sender, context, QUESTION, "q2c@0.2 raw")
    for text in (MORE, "Then it was spring. ", "Nobody sang. "):
        context = sender.extend(context, text)
        held, added = take(receiver, sender, context, OTHER, "q2c@0.2 raw", held)
        assert added.manifest.base is not None
    for layer, full in zip(held.cache.layers, context.cache.layers, strict=True):
        at = layer.positions[..., None].expand(-1, -1, layer.keys.shape[-1])
        assert torch.equal(layer.keys, full.keys.gather(1, at))


def test_what_is_noted_of_transfers_is_bounded(sender, context):
    for seed in range(40):
        transfer = sender.pack(context, "", f"random@0.9 raw scope=head seed={seed}")
        assert transfer.frames
    assert 1 < len(context.delivered) <= 32
    assert sum(left.nbytes for left in context.delivered.values()) <= max(
        1_000_000, context.cache.nbytes // 8
    )
    assert bytes.fromhex(transfer.receipt.cache_digest) in context.delivered, "the latest ones stay"


def test_an_unknown_base_and_one_by_another_codec_are_as_if_none_was_named(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 int4")
    digest = bytes.fromhex(first.receipt.cache_digest)
    for transfer in (
        sender.pack(context, OTHER, "q2c@0.3 int4", base=b"?" * 16),
        sender.pack(context, OTHER, "q2c@0.3 int8", base=digest),
        sender.pack(context, OTHER, "text", base=digest),
    ):
        assert transfer.manifest.base is None
        assert receiver.receive(transfer.frames)


def forged(transfer, **changed):
    """The transfer with another manifest, every checksum right."""
    _, segments = read_transfer(transfer.frames)
    return list(SendSession(replace(transfer.manifest, **changed)).transfer(segments))


def test_a_base_that_is_not_what_the_manifest_says_is_refused(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 raw")
    other, _ = take(receiver, sender, sender.read(MORE * 3), OTHER, "q2c@0.3 raw")
    _, added = take(receiver, sender, context, OTHER, "q2c@0.3 raw", first)
    base = added.manifest.base
    with pytest.raises(NotFoundError, match="is not here"):
        receiver.receive(added.frames)
    with pytest.raises(NotFoundError, match="is not here"):
        receiver.receive(added.frames, base=other)
    with pytest.raises(RemoteProtocolError, match="positions of"):
        receiver.receive(forged(added, base=replace(base, kept=base.kept + 1)), base=first)
    with pytest.raises(IdentityError, match="another context"):
        receiver.receive(forged(added, context_digest=b"?" * 16), base=first)


def test_a_position_that_is_there_already_is_refused(sender, receiver, context):
    first, whole = take(receiver, sender, context, QUESTION, "q2c@0.3 raw")
    _, added = take(receiver, sender, context, OTHER, "q2c@0.3 raw", first)
    _, segments = read_transfer(whole.frames)
    frames = list(SendSession(added.manifest).transfer(segments))
    with pytest.raises(CodecError, match="comes in two segments"):
        receiver.receive(frames, base=first)


def test_wiping_the_base_leaves_what_was_added_whole(sender, receiver, context):
    first, _ = take(receiver, sender, context, QUESTION, "q2c@0.3 raw")
    second, _ = take(receiver, sender, context, OTHER, "q2c@0.3 raw", first)
    before = [layer.keys.clone() for layer in second.cache.layers]
    first.wipe()
    for layer, keys in zip(second.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("background", ["", " rest=int2"])
@pytest.mark.parametrize("sets", [1, 6])
def test_plans_over_a_base_make_the_cache_of_all_positions_so_far(sets, background):
    """Random wishes one after another: what is held is their union, and what is there was never sent again."""
    cache = make_cache(3, 2, 40, 4, 5)
    recipe = Recipe.parse(f"q2c@0.2 raw{background}")
    torch.manual_seed(sets)
    held, record, had = None, None, torch.zeros(3, 2, 40, dtype=torch.bool)
    for _ in range(4):
        order = torch.rand(sets, 40).argsort(1)[:, :8].sort(1).values
        wanted = order[0] if sets == 1 else order.reshape(3, 2, -1)
        scores = torch.rand(sets, 40)
        plans = (
            plan(cache, recipe, wanted)
            if record is None
            else plan_missing(cache, recipe, wanted, scores, record)
        )
        if not plans:
            continue
        before = record
        record = delivered(plans, recipe, b"d" * 16, before)
        held = decoded([encode(one, recipe.coder) for one in plans], cache.shape, base=held)
        mask = torch.zeros(3, 2, 40, dtype=torch.bool).scatter_(2, wanted.expand(3, 2, -1), True)
        had |= mask
        assert isinstance(record, Delivered)
        fine = record.fine if record.fine is not None else torch.arange(40)
        got = torch.zeros(3, 2, 40, dtype=torch.bool).scatter_(2, fine.expand(3, 2, -1), True)
        if sets == 1:
            assert torch.equal(got, had)
        for layer, full, row in zip(held.layers, cache.layers, got, strict=True):
            assert layer.positions.shape[1] == record.base.kept
            for head in range(2):
                at = [layer.positions[head].tolist().index(i) for i in row[head].nonzero()[:, 0].tolist()]
                assert torch.equal(layer.keys[head, at], full.keys[head][row[head]])


async def test_a_second_question_and_the_next_turn_over_grpc(pair):
    published = await pair.source.publish(TEXT)
    recipe = "q2c@0.3 int8"
    first = await pair.deliver(recipe, context_id=published.context_id)
    digest = bytes.fromhex(first.receipt.cache_digest)
    second = await pair.deliver(recipe, context_id=published.context_id, question=OTHER, base_digest=digest)
    assert second.receipt.wire_bytes < first.receipt.wire_bytes
    assert second.receipt.kept_share > first.receipt.kept_share
    assert second.cache_id != first.cache_id
    assert await pair.answer(second.cache_id, OTHER)
    assert await pair.answer(first.cache_id), "the base is as it was"
    longer = await pair.source.publish(MORE, extends=published.context_id)
    digest = bytes.fromhex(second.receipt.cache_digest)
    third = await pair.deliver(recipe, context_id=longer.context_id, question=OTHER, base_digest=digest)
    assert third.receipt.context_tokens == longer.context_tokens > published.context_tokens
    whole = await pair.deliver(recipe, context_id=longer.context_id, question=OTHER)
    assert third.receipt.wire_bytes < whole.receipt.wire_bytes
    assert await pair.answer(third.cache_id, OTHER)


async def test_a_base_that_the_receiver_has_lost_is_said_and_nothing_is_left(pair):
    published = await pair.source.publish(TEXT)
    first = await pair.deliver("q2c@0.3 int8", context_id=published.context_id)
    await pair.target.delete_cache(first.cache_id)
    digest = bytes.fromhex(first.receipt.cache_digest)
    with pytest.raises(NotFoundError, match="is not here"):
        await pair.deliver(
            "q2c@0.3 int8", context_id=published.context_id, question=OTHER, base_digest=digest
        )
    assert pair.receiver.store.reserved_bytes == 0
    assert len(pair.sender.outbox) == 1, "the first delivery, which may be asked for again"


async def test_a_fetch_brings_what_the_caller_lacks(pair):
    published = await pair.source.publish(TEXT)
    receiver = Receiver(pair.sender._sender.lm)
    fetch = Fetch(published.context_id, QUESTION, "q2c@0.3 int8")
    first = receiver.receive([frame async for frame in pair.source.fetch(fetch)])
    asked = replace(fetch, question=OTHER, base_digest=bytes.fromhex(first.receipt.cache_digest))
    frames = [frame async for frame in pair.source.fetch(asked)]
    second = receiver.receive(frames, base=first)
    assert second.receipt.wire_bytes < first.receipt.wire_bytes
    assert receiver.answer(second, OTHER).text is not None


async def test_after_a_restart_a_base_comes_back_from_disk(random_lm, tmp_path):
    lm = random_lm("qwen2", "bfloat16")
    sender = Sender(lm)
    context = sender.read(TEXT)
    settings = ReceiverSettings(staging=tmp_path)
    first = sender.pack(context, QUESTION, "q2c@0.3 int8")
    done = await feed(ReceiverService(Receiver(lm), settings), first.frames)
    digest = bytes.fromhex(done[-1].receipt.cache_digest)
    added = sender.pack(context, OTHER, "q2c@0.3 int8", base=digest)
    again = ReceiverService(Receiver(lm), settings)
    statuses = await feed(again, added.frames)
    assert statuses[-1].state == "complete"
    told = await answer(again, statuses[-1].cache_id, OTHER)
    third = ReceiverService(Receiver(lm), settings)
    assert await answer(third, statuses[-1].cache_id, OTHER) == told, "both come back"
