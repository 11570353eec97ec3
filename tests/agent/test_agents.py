"""The agents over real gRPC: deliver, fetch, answer; what may travel, and what must not."""

from __future__ import annotations

import asyncio
import copy
import sys
from dataclasses import replace

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.agent.settings import ReceiverSettings
from kvlink.errors import (
    AccessError,
    BusyError,
    ConfigError,
    ContextError,
    IdentityError,
    IntegrityError,
    LimitError,
    NotFoundError,
    PeerUnavailableError,
    RecipeError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.loading import wrap
from kvlink.model.restore import cache_shape
from kvlink.recipe import Target
from kvlink.transport.api import Ask, Fetch, PushStatus
from kvlink.transport.link import grpc_bytes
from kvlink.wire.session import ReceiveSession, SendSession
from tests.agent.conftest import QUESTION, TEXT, feed
from tests.conftest import ARCHITECTURES
from tests.relay import relay


@pytest.fixture
def small_chunks(pair):
    """Transfers of many frames, so that there is something to cut between."""
    pair.sender._sender.chunk_bytes = 4096


RECIPES = (
    "text",
    "raw",
    "lossless",
    "int8",
    "q2c@0.5 int4",
    "q2c+draft@0.25 int4 scope=head",
    "h2o@0.5 int8",
)


@pytest.mark.parametrize("recipe", RECIPES)
async def test_every_recipe_delivers_and_answers(pair, recipe):
    done = await pair.deliver(recipe, answer_here=True)
    answer = await pair.answer(done.cache_id)
    if recipe in ("text", "raw", "lossless"):
        assert answer == done.sender_answer
    receipt = done.receipt
    assert receipt.wire_bytes == sum(receipt.bytes.values()) > 0
    assert receipt.context_tokens == len(pair.sender._sender.lm.context_ids(TEXT))
    expected = {"prefill", "encode", "wire"} | ({"read"} if recipe == "text" else {"decode", "select"})
    assert expected <= set(receipt.stage_s)
    assert all(seconds >= 0 for seconds in receipt.stage_s.values())


async def test_the_receipt_counts_every_byte_of_the_socket(pair):
    """Computed bytes and the kernel's own count differ by connection setup and control only."""
    done = await pair.deliver("raw")
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells a connection's bytes")
    assert 0 <= done.receipt.socket_bytes - done.receipt.wire_bytes < 1500


async def test_generation_streams_token_by_token(pair):
    done = await pair.deliver("raw")
    pieces = [p async for p in pair.target.generate(Ask(done.cache_id, QUESTION, max_new_tokens=12))]
    assert [len(p.token_ids) for p in pieces[:-1]] == [1] * (len(pieces) - 1)
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].receipt.stage_s["first_token"] > 0


async def test_a_published_context_serves_many_questions_until_it_is_unpublished(pair):
    published = await pair.source.publish(TEXT)
    assert published.context_tokens > 50
    for question in (QUESTION, "Who carried the crates?"):
        done = await pair.deliver("raw", context_id=published.context_id, question=question)
        assert done.receipt.stage_s["prefill"] == 0
    await pair.source.unpublish(published.context_id)
    with pytest.raises(NotFoundError, match="never there, deleted or expired"):
        await pair.deliver("raw", context_id=published.context_id)


async def test_earlier_turns_are_part_of_what_is_read(pair):
    plain = await pair.source.publish(TEXT)
    turns = [("user", "I am looking for a birthplace."), ("assistant", "Whose?")]
    longer = await pair.source.publish(TEXT, turns=turns)
    assert longer.context_tokens > plain.context_tokens
    done = await pair.deliver("text", context_id=longer.context_id, answer_here=True)
    assert await pair.answer(done.cache_id) == done.sender_answer


async def test_a_fetch_gives_frames_that_a_receiver_restores(pair):
    published = await pair.source.publish(TEXT)
    frames = [f async for f in pair.source.fetch(Fetch(published.context_id, QUESTION, "raw"))]
    receiver = Receiver(pair.receiver._receiver.lm)
    own = pair.sender._sender.answer(pair.sender._sender.read(TEXT), QUESTION)
    assert receiver.answer(receiver.receive(frames), QUESTION).token_ids == own.token_ids


async def test_a_budget_is_kept_and_used(pair):
    for budget in (12_000, 20_000):
        done = await pair.deliver("q2c@1.0 int4", target=Target(budget))
        assert 0.85 * budget < done.receipt.wire_bytes <= budget
    with pytest.raises(LimitError, match="no cache fits 900 bytes"):
        await pair.deliver("q2c@1.0 int4", target=Target(900))
    chosen = await pair.deliver("int4", target=Target(12_000))
    assert chosen.receipt.wire_bytes <= 12_000
    assert chosen.receipt.kept_tokens < chosen.receipt.context_tokens


async def test_the_receiver_never_sees_the_text_in_kv_mode(pair):
    """What goes over the wire: no words of the context, neither as text nor as token ids."""
    async with relay(pair.receiver_port) as wire:
        done = await pair.deliver("int8", receiver=f"127.0.0.1:{wire.port}")
        assert len(wire.seen) > done.receipt.wire_bytes * 0.95
        lm = pair.receiver._receiver.lm
        for word in {w for w in TEXT.split() if len(w) > 4}:
            assert word.encode() not in wire.seen
        ids = lm.context_ids(TEXT)
        for width in (2, 4):
            run = b"".join(i.to_bytes(width, "little") for i in ids[10:14])
            assert run not in wire.seen


async def test_the_same_relay_sees_the_text_in_text_mode(pair):
    """The counterpart: the check above would notice."""
    async with relay(pair.receiver_port) as wire:
        await pair.deliver("text", receiver=f"127.0.0.1:{wire.port}", text="Maret Olsun was born in Tavik.")
        assert b"Maret Olsun" in wire.seen


async def test_one_corrupted_chunk_means_an_error_and_no_generation(pair):
    def flip(data: bytes, offset: int) -> bytes:
        # One bit, well inside the codes.
        at = 30_000 - offset
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data

    async with relay(pair.receiver_port, change=flip) as wire:
        with pytest.raises(IntegrityError, match="expected crc32c"):
            await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
        assert len(wire.seen) > 30_000
    assert len(pair.receiver.store) == 0, "nothing was kept that could be answered from"
    assert len(pair.receiver.inbound) == 0


@pytest.mark.parametrize("cut_after", [2_000, 40_000, 60_000])
async def test_a_cut_transfer_resumes_on_a_new_connection(pair, cut_after, small_chunks):
    reference = await pair.answer((await pair.deliver("raw")).cache_id)
    async with relay(pair.receiver_port, cut_after=cut_after) as wire:
        done = await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
        assert wire.cuts == 1
    assert await pair.answer(done.cache_id) == reference


async def test_resume_does_not_send_again_what_has_arrived(pair, small_chunks):
    sender = pair.sender._sender
    frames = sender.pack(sender.read(TEXT), QUESTION, "raw").frames

    async def half():
        for frame in frames[:9]:
            yield frame

    with pytest.raises(TruncatedError, match="before frame 9"):
        async for _ in pair.receiver.push_cache(half()):
            pass
    sent: list[int] = []
    statuses: list[PushStatus] = []
    async for item in pair.target.push(frames):
        (sent if isinstance(item, int) else statuses).append(item)
    assert statuses[0] == PushStatus("accepted", 9)
    assert [s.state for s in statuses] == ["accepted", "durable", "complete"]
    status = await pair.target.transfer_status(sender_id(frames))
    assert status.state == "complete"
    again = [item async for item in pair.target.push(frames)]
    assert [s.state for s in again] == ["complete"], "a transfer that is there is not sent again"
    assert again[0].cache_id == statuses[-1].cache_id
    await pair.target.delete_cache(again[0].cache_id)
    anew = [item.state async for item in pair.target.push(frames) if not isinstance(item, int)]
    assert anew == ["accepted", "durable", "complete"], "a cache that is gone is taken anew"


async def test_a_second_stream_takes_a_transfer_over(pair, small_chunks):
    """The first stream's connection is taken for dead; its next frame is refused."""
    sender = pair.sender._sender
    frames = sender.pack(sender.read(TEXT), QUESTION, "raw").frames
    more, waits = asyncio.Event(), asyncio.Event()

    async def slow():
        yield frames[0]
        yield frames[1]
        waits.set()
        await more.wait()
        yield frames[2]

    first = pair.receiver.push_cache(slow())
    assert (await anext(first)).state == "accepted"
    waiting = asyncio.create_task(anext(first))
    await waits.wait()
    statuses = [item async for item in pair.target.push(frames) if not isinstance(item, int)]
    assert statuses[0].next_sequence == 2
    assert statuses[-1].state == "complete"
    more.set()
    with pytest.raises(RemoteProtocolError, match="taken this transfer over"):
        await waiting
    assert await pair.answer(statuses[-1].cache_id) is not None


async def test_broken_transfers_and_old_caches_are_forgotten(pair, small_chunks):
    sender = pair.sender._sender
    frames = sender.pack(sender.read(TEXT), QUESTION, "raw").frames

    async def half():
        for frame in frames[:9]:
            yield frame

    with pytest.raises(TruncatedError):
        async for _ in pair.receiver.push_cache(half()):
            pass
    assert len(pair.receiver.inbound) == 1
    pair.receiver.inbound.settings = replace(pair.receiver.settings, resume_lifetime_s=-1.0)
    pair.receiver.sweep()
    assert len(pair.receiver.inbound) == 0
    assert pair.receiver.store.reserved_bytes == 0, "all room was given back"


def sender_id(frames) -> bytes:
    session = ReceiveSession()
    session.receive(frames[0])
    return session.manifest.transfer_id


async def test_several_transfers_and_generations_at_once_are_not_mixed(pair):
    texts = [TEXT.replace("Tavik", name) + name for name in ("Oslun", "Berrik", "Calto", "Dovane")]
    alone = []
    for text in texts:
        alone.append(await pair.answer((await pair.deliver("raw", text=text)).cache_id))
    done = await asyncio.gather(*(pair.deliver("raw", text=text) for text in texts))
    together = await asyncio.gather(*(pair.answer(d.cache_id) for d in done))
    assert together == alone
    twice = await asyncio.gather(*(pair.answer(done[0].cache_id) for _ in range(3)))
    assert twice == [alone[0]] * 3


async def test_deleted_caches_are_gone(pair):
    done = await pair.deliver("raw")
    await pair.target.delete_cache(done.cache_id)
    with pytest.raises(NotFoundError):
        await pair.answer(done.cache_id)
    with pytest.raises(NotFoundError):
        await pair.target.delete_cache(done.cache_id)
    with pytest.raises(NotFoundError, match="no transfer"):
        await pair.target.transfer_status(b"x" * 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "  \n "}, ContextError, "the context is empty"),
        ({"recipe": "bogus"}, RecipeError, "bogus"),
        ({"recipe": "q2c@1.5 int4"}, RecipeError, "at most 1, got 1.5"),
        ({"recipe": "q2c@0 int4"}, RecipeError, "above 0"),
        ({"recipe": "q2c@0.5 int4", "question": " "}, ContextError, "needs the question"),
        (
            {"recipe": "q2c@0.5 int4", "question": "why " * 600},
            ContextError,
            "more than the model's window of 512",
        ),
        ({"text": "word " * 3000}, ContextError, "the model's window 512"),
        ({"receiver": "10.1.2.3:50052"}, AccessError, "not in this agent's peer list"),
        ({"receiver": "nonsense"}, ConfigError, "expected an address"),
        ({"receiver": "10.0.0.1:1"}, AccessError, "peer list"),
        ({"context_id": "unknown"}, NotFoundError, "no context"),
    ],
)
async def test_bad_input_is_refused_by_name_and_loses_nothing(pair, options, error, message):
    kept = await pair.deliver("raw")
    with pytest.raises(error, match=message):
        await pair.deliver(**options)
    assert await pair.answer(kept.cache_id) is not None
    assert len(pair.receiver.store) == 1


async def test_a_question_that_is_too_long_is_refused_at_the_receiver_too(pair):
    done = await pair.deliver("raw")
    with pytest.raises(ContextError, match="more than the model's window of 512"):
        await pair.answer(done.cache_id, "why " * 600)
    with pytest.raises(ContextError, match="at most 1024"):
        await pair.answer(done.cache_id, max_new_tokens=5000)
    assert isinstance(await pair.answer(done.cache_id), str)


@pytest.mark.parametrize(
    ("architecture", "seed", "component"),
    [("llama", 0, "weights"), ("qwen2", 1, "weights")],
    ids=["another model", "sibling fine-tune"],
)
async def test_another_model_at_the_receiver_is_refused_before_any_byte(
    pair, random_lm, architecture, seed, component
):
    """A sibling has the same shapes, tokenizer and template, and other weights."""
    pair.receiver._receiver = Receiver(random_lm(architecture, "bfloat16", seed))
    async with relay(pair.receiver_port) as wire:
        with pytest.raises(IdentityError, match=f"{component} differ"):
            await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
        assert len(wire.seen) < 2000
    assert (await pair.deliver("text")).cache_id, "text needs the tokenizer and the template only"


async def test_a_forged_capability_does_not_help(pair, random_lm):
    """The receiver checks the manifest itself, whatever the sender believed."""
    other = Sender(random_lm("qwen2", "bfloat16", 1))
    frames = other.pack(other.read(TEXT), QUESTION, "raw").frames
    with pytest.raises(IdentityError, match="weights differ"):
        [item async for item in pair.target.push(frames)]


async def test_what_only_the_probe_sees_is_refused_before_any_byte_and_at_the_manifest(pair, random_lm):
    """The same files and the same fingerprint, but the model that runs was changed."""
    model = copy.deepcopy(random_lm("qwen2", "bfloat16").model)
    model.model.rotary_emb.inv_freq *= 0.9
    other = wrap("changed", model, pair.sender._sender.lm.tokenizer)
    assert other.fingerprint == pair.sender._sender.lm.fingerprint
    forged = Sender(other)
    frames = forged.pack(forged.read(TEXT), QUESTION, "raw").frames
    with pytest.raises(
        IdentityError, match="probe: the caches of a fixed text differ from the keys of layer 0"
    ):
        [item async for item in pair.target.push(frames)]
    pair.receiver._receiver = Receiver(other)
    async with relay(pair.receiver_port) as wire:
        with pytest.raises(IdentityError, match="probe: the caches of a fixed text differ"):
            await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
        assert len(wire.seen) < 2000
    assert (await pair.deliver("text")).cache_id, "text needs the tokenizer and the template only"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 5}, "layers: here 4, at the peer 5"),
        ({"kv_heads": 4}, "kv heads: here 2, at the peer 4"),
        ({"whole_layers": ((1, 3),)}, "whole layers"),
        ({"tokens": 600}, "the model's window 512"),
    ],
)
def test_a_shape_that_this_model_would_not_make_is_refused_at_the_manifest(random_lm, change, message):
    sender = Sender(random_lm("qwen2", "bfloat16"))
    manifest = sender.pack(sender.read(TEXT), QUESTION, "raw").manifest
    forged = replace(manifest, shape=replace(manifest.shape, **change))
    with pytest.raises(IdentityError, match=message):
        Receiver(sender.lm).receive([SendSession(forged).open()])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_shape_that_a_model_expects_is_the_one_that_it_makes(random_lm, architecture):
    sender = Sender(random_lm(architecture))
    context = sender.read(TEXT)
    assert cache_shape(sender.lm, context.cache.tokens) == context.cache.shape


async def test_another_dtype_is_refused(pair, checkpoint):
    from kvlink.model.loading import load

    wide = Sender(load(str(checkpoint("qwen2", "bfloat16")), dtype="float32"))
    frames = wide.pack(wide.read(TEXT), QUESTION, "raw").frames
    with pytest.raises(IdentityError, match="dtype: here bfloat16, at the peer float32"):
        [item async for item in pair.target.push(frames)]


async def test_a_peer_that_is_gone_is_reported(pair):
    with pytest.raises(PeerUnavailableError, match="nobody listens there"):
        await pair.deliver("raw", receiver="127.0.0.1:9")


async def test_a_peer_that_goes_in_mid_transfer_is_reported_and_frees_the_sender(pair):
    async with relay(pair.receiver_port, cut_after=20_000, cut_always=True) as wire:
        with pytest.raises(PeerUnavailableError):
            await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
    assert (await pair.deliver("raw")).cache_id, "the sender goes on serving"


@pytest.fixture
def receiver_settings(request) -> ReceiverSettings:
    return getattr(request, "param", ReceiverSettings())


@pytest.mark.parametrize("receiver_settings", [ReceiverSettings(max_held_bytes=100_000)], indirect=True)
async def test_what_does_not_fit_is_refused_before_it_is_taken(pair):
    with pytest.raises(LimitError, match="at most 100000 are held"):
        await pair.deliver("raw")
    assert pair.receiver.store.held_bytes == 0


@pytest.mark.parametrize("receiver_settings", [ReceiverSettings(max_transfers=0, wait_s=0.1)], indirect=True)
async def test_transfers_at_a_time_are_bounded(pair):
    with pytest.raises(LimitError, match="at most 0 transfers"):
        await pair.deliver("raw")


async def test_capabilities_say_what_an_agent_is(pair):
    there = await pair.target.capabilities()
    here = await pair.source.capabilities()
    assert there.fingerprint == here.fingerprint
    assert there.spoken.protocol_min <= 1 <= there.spoken.protocol_max
    assert {"kv", "text"} <= set(there.spoken.modes)
    assert there.limits["max_context_tokens"] == 511


def test_rows_of_grpc_overhead():
    assert grpc_bytes([100]) == 5 + 2 + 9
    assert grpc_bytes([16_384, 10]) == 10 + 4 + 2 + 9 * 2


async def test_grpc_bytes_match_what_a_connection_carries(pair):
    async with relay(pair.receiver_port) as wire:
        before = len(wire.seen)
        done = await pair.deliver("raw", receiver=f"127.0.0.1:{wire.port}")
        carried = len(wire.seen) - before
    # Two connections (handshake, push) with their prefaces, settings and headers.
    assert 0 <= carried - done.receipt.wire_bytes < 3000


@pytest.mark.parametrize("recipe", ["q2c@0.5 int4", "q2c+draft@0.25 int4 scope=head", "int8", "text"])
async def test_an_explanation_tells_what_was_chosen_token_by_token(pair, recipe):
    done = await pair.deliver(recipe, explain=True)
    told, receipt = done.explanation, done.receipt
    assert "".join(told.tokens) == f"Context: {TEXT}\n"
    assert len(told.tokens) == len(told.need) == len(told.kept) == receipt.context_tokens
    assert sum(told.need) == pytest.approx(1, abs=1e-4)
    assert min(told.need) >= 0
    kept = receipt.kept_tokens or receipt.context_tokens
    assert sum(told.kept) == pytest.approx(kept, rel=1e-4), "shares add up to the tokens that were kept"
    assert told.kept[:4] == (1, 1, 1, 1), "sinks are everywhere"


async def test_without_being_asked_nothing_is_explained(pair):
    assert (await pair.deliver("int8")).explanation.tokens == ()


async def test_a_handle_does_not_show_its_context(pair):
    published = await pair.source.publish(TEXT)
    with pytest.raises(AccessError, match="only who sends the text is told what was chosen"):
        await pair.deliver("int8", context_id=published.context_id, explain=True)


async def test_callers_cannot_make_a_sender_import_kvpress(pair):
    with pytest.raises(AccessError, match="this sender imports no kvpress for its callers"):
        await pair.deliver("press:KnormPress@0.5 int4")


async def test_a_transfer_that_brings_nothing_keeps_no_place(pair):
    receiver = pair.receiver
    receiver.settings = receiver.inbound.settings = replace(receiver.settings, start_s=0.05)
    frames = pair.sender._sender.pack(pair.sender._sender.read(TEXT), QUESTION, "int8").frames

    async def stream(hang_up: bool):
        yield frames[0]
        if not hang_up:
            await asyncio.Event().wait()

    for hang_up, error in ((False, BusyError), (True, TruncatedError)):
        with pytest.raises(error):
            async for status in receiver.push_cache(stream(hang_up)):
                assert status.state == "accepted"
        assert receiver.inbound.gate.inside == 0
        assert receiver.store.reserved_bytes == 0
    receiver.settings = replace(receiver.settings, start_s=60.0)
    statuses = await feed(receiver, frames)
    assert statuses[-1].state == "complete", "the same id may begin anew"
