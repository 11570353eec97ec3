"""Recipes that adapt, certificates, and profiles that travel ahead: over real gRPC, on the embedded model."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import typer.main

import kvlink
from kvlink.agent.adapt import INT8_GRADE, automatic, step_for
from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import SenderSettings
from kvlink.cli import app
from kvlink.cli.configuration import commands_of
from kvlink.codecs import Quantized
from kvlink.errors import IdentityError, LimitError, RecipeError
from kvlink.eval.questions import generated
from kvlink.model.generate import answer
from kvlink.recipe import DEFAULT_RECIPE, Recipe, Target
from kvlink.show import receipt_dict
from kvlink.transport.api import Caller, Delivery
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server

ITEM = next(item for item in generated(21) if item.answers[0].count(" ") == 1)
"""Asked for a name of several tokens, so that a coarse message has something to lose."""


@pytest.fixture(scope="module")
def sender(tiny) -> Sender:
    return Sender(tiny)


@pytest.fixture(scope="module")
def context(sender):
    return sender.read(ITEM.context)


def test_auto_is_the_step_that_the_profile_says_the_model_bears(tiny, sender, context):
    measured = {code: share for code, share in tiny.profile.quality if share >= 0.99}
    recipe = sender.recipe("auto")
    assert recipe.codec.step_code == max(measured, default=INT8_GRADE)
    assert recipe.selection.method == "all"
    transfer = sender.pack(context, "", "auto")
    assert tiny.profile.digest.hex() in transfer.receipt.recipe


@pytest.fixture(scope="module")
def plain(tiny) -> Sender:
    """A sender of a model that nobody has measured."""
    return Sender(replace(tiny, profile=None))


def test_without_a_profile_auto_is_int8_and_so_is_what_nobody_names(plain, context):
    assert plain.recipe("auto") == Recipe.parse("int8")
    transfer = plain.pack(context, "")
    assert transfer.manifest.recipe == Recipe.parse("int8")
    assert transfer.receipt.warnings == ()


def test_the_default_is_auto_wherever_one_stands(tiny, context):
    assert DEFAULT_RECIPE == "auto"
    assert SenderSettings().default_recipe == DEFAULT_RECIPE
    for function in (Sender.pack, kvlink.pack):
        assert inspect.signature(function).parameters["recipe"].default == DEFAULT_RECIPE
    commands = dict(commands_of(typer.main.get_command(app)))
    for name in ("pack", "ask", "fetch"):  # for ask and fetch the sender's
        (said,) = [p.default for p in commands[(name,)].params if p.name == "recipe"]
        assert said == (DEFAULT_RECIPE if name == "pack" else "")


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ("transform=1", Target()),
        ("auto", Target(max_bits=4)),
        ("auto", Target(quality=0.9)),
        ("transform=1 basis=own", Target()),
    ],
)
def test_a_transform_that_nobody_measured_says_so_in_its_receipt(plain, context, recipe, target):
    receipt = plain.pack(context, ITEM.question, recipe, target).receipt
    (warning,) = receipt.warnings
    assert "--verify" in warning
    assert "kvlink profile build" in warning
    assert receipt_dict(receipt)["warnings"] == [warning]


def test_what_was_measured_warns_of_nothing(sender, context):
    receipt = sender.pack(context, ITEM.question, "auto", Target(max_bits=4)).receipt
    assert receipt.warnings == ()
    assert "warnings" not in receipt_dict(receipt)


def test_steps_follow_what_was_measured(tiny):
    profile = replace(tiny.profile, quality=((-8, 1.0), (-4, 1.0), (0, 0.99), (4, 0.7)))
    assert step_for(profile, 1.0) == -4
    assert step_for(profile, 0.99) == 0
    assert step_for(profile, 0.5) == 4
    assert step_for(replace(profile, quality=((0, 0.5),)), 0.9) == INT8_GRADE
    assert automatic(profile).codec.step_code == 0


@pytest.mark.parametrize("bits", [0.8, 1.5, 3.0])
def test_bits_are_the_most_that_a_message_has_and_are_used(sender, context, bits):
    found = sender.pack(context, ITEM.question, "transform=1", Target(max_bits=bits)).receipt.bits_per_element
    assert 0.75 * bits < found <= bits
    selected = sender.pack(context, ITEM.question, "q2c@0.5 transform=1", Target(max_bits=bits))
    assert selected.receipt.bits_per_element <= bits
    assert selected.manifest.recipe.codec.step_code < 0 or bits < 1


def test_a_budget_takes_all_positions_where_they_fit_and_chooses_where_not(sender, context):
    whole = sender.pack(context, ITEM.question, "transform=1")
    size = whole.receipt.wire_bytes
    roomy = sender.pack(context, ITEM.question, "transform=1", Target(budget_bytes=size))
    assert roomy.receipt.kept_tokens == context.cache.tokens
    tight = sender.pack(context, ITEM.question, "transform=1", Target(budget_bytes=size // 3))
    assert 0.7 * size / 3 < tight.receipt.wire_bytes <= size // 3
    assert tight.receipt.kept_tokens < context.cache.tokens


def test_a_certificate_says_what_the_receiver_will_find(tiny, sender, context):
    receiver = Receiver(tiny)
    for recipe in (
        "raw",
        "int8",
        "transform=1",
        "q2c+draft@0.25 int4",
        "q2c+draft@0.25 transform=0.5 rest=4",
        "int1",
    ):
        transfer = sender.pack(context, ITEM.question, recipe)
        found = sender.certify(context, ITEM.question, transfer)
        told = receiver.answer(receiver.receive(transfer.frames), ITEM.question).text
        own = answer(tiny, context.cache, ITEM.question).text
        assert found.passed is (told == own), recipe
        assert found.seconds > 0
    assert sender.certify(context, ITEM.question, sender.pack(context, "", "raw")).logit_error == 0


def test_a_message_that_does_not_pass_is_made_finer_until_it_does(tiny, sender, context):
    for recipe in ("int1", "transform=64", "streaming@12tok int8", "svd=1 int8"):
        bare = sender.certify(context, ITEM.question, sender.pack(context, ITEM.question, recipe))
        assert not bare.passed, recipe
        transfer = sender.pack(context, ITEM.question, recipe, Target(verify=True))
        found = transfer.receipt.certificate
        assert found.passed, recipe
        assert found.escalations > 0
        assert transfer.receipt.stage_s["verify"] >= found.seconds > 0
        held = Receiver(tiny).receive(transfer.frames)
        assert answer(tiny, held.cache, ITEM.question).text == answer(tiny, context.cache, ITEM.question).text


def test_recipes_grow_finer_to_the_whole_cache():
    for text in ("int1", "transform=64", "q2c@0.1 transform=4 rest=16", "q2c@0.1 int4 svd=8 layers=0:int8"):
        recipe, seen = Recipe.parse(text), 0
        while (next_one := recipe.finer()) is not None:
            recipe, seen = next_one, seen + 1
            assert seen < 16
        assert recipe == Recipe.parse("raw")


@pytest.mark.parametrize(
    ("recipe", "target", "error", "message"),
    [
        ("int4", Target(max_bits=2), RecipeError, "a number of bits needs a recipe with a step"),
        ("int4", Target(quality=0.9), RecipeError, "a quality needs a recipe with a step"),
        ("transform=1", Target(quality=2), RecipeError, "quality must be above 0 and at most 1"),
        (
            "int8",
            Target(max_bits=2),
            RecipeError,
            "a number of bits needs a recipe with a step: .*got all keys=int8",
        ),
        ("text", Target(quality=0.9), RecipeError, "a quality needs .* got text"),
        (
            "text",
            Target(budget_bytes=500),
            LimitError,
            r"the text takes \d{3,} bytes, more than the budget of 500",
        ),
        (
            "transform=1",
            Target(max_bits=0.0001),
            LimitError,
            r"at most 0.0001 bits .* the smallest transfer takes \d+",
        ),
        (
            "q2c@0.5 transform=1",
            Target(max_bits=0.0001),
            LimitError,
            r"takes 0\.\d+ bits an element, more than the 0.0001",
        ),
        (
            "auto",
            Target(max_bits=0.5, quality=0.99),
            LimitError,
            r"a quality of 0.99 takes [0-9.]+ bits an element",
        ),
        ("transform=1", Target(budget_bytes=500), LimitError, "no cache fits 500 bytes"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(sender, context, recipe, target, error, message):
    with pytest.raises(error, match=message):
        sender.pack(context, ITEM.question, recipe, target)


TARGETS = [
    Target(budget, bits, quality, verify)
    for budget in (0, 4_000) for bits in (0.0, 0.3, 3.0) for quality in (0.0, 0.9) for verify in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("measured", [True, False], ids=["profile", "no profile"])
@pytest.mark.parametrize("question", [ITEM.question, ""], ids=["question", "no question"])
def test_wishes_alone_and_together_are_met_by_the_default_or_refused_with_the_least(
    sender, plain, context, measured, question, target
):
    if target.verify and not question:
        pytest.skip("nothing to check: refused as a missing question")
    try:
        transfer = (sender if measured else plain).pack(context, question, DEFAULT_RECIPE, target)
    except LimitError as error:
        transfer, refusal = None, str(error)
    if transfer is None:
        asked = [f"{target.max_bits:g} " if target.max_bits else "", str(target.budget_bytes or "")]
        assert any(word and word in refusal for word in asked)
        assert re.search(r"takes \d|has \d+ bytes", refusal), "what the least is"
        return
    receipt, recipe = transfer.receipt, transfer.manifest.recipe
    assert not target.max_bits or receipt.bits_per_element <= target.max_bits
    assert not target.budget_bytes or receipt.wire_bytes <= target.budget_bytes
    assert not target.verify or receipt.certificate.passed
    if target.quality and recipe.selection.method == "all" and recipe.codec != Quantized():
        assert recipe.codec.step_code <= step_for(sender.lm.profile if measured else None, target.quality)
    assert bool(receipt.warnings) is ("basis=own" in receipt.recipe)


async def test_over_the_wire_too_and_in_the_senders_log(pair, caplog):
    silent = await pair.deliver("")
    assert silent.receipt.warnings == ()
    assert "int8" in silent.receipt.recipe
    with caplog.at_level("WARNING", logger="kvlink"):
        told = await pair.deliver("", target=Target(max_bits=6))
    (warning,) = told.receipt.warnings
    assert [record.getMessage() for record in caplog.records] == [warning]
    assert caplog.records[0].transfer == told.receipt.transfer_id


async def test_an_operators_default_that_has_no_step_gives_way_to_a_wish_for_one(pair):
    pair.sender.settings = replace(pair.sender.settings, default_recipe="int4")
    assert "int4" in (await pair.deliver("")).receipt.recipe
    assert (await pair.deliver("", target=Target(max_bits=3))).receipt.bits_per_element <= 3
    with pytest.raises(RecipeError, match="got all keys=int4"):
        await pair.deliver("int4", target=Target(max_bits=3))


def test_a_rest_is_never_finer_than_a_step_that_bits_ask_for(sender, context):
    recipe = "q2c+draft@0.25 transform=0.5 rest=2"
    transfer = sender.pack(context, ITEM.question, recipe, Target(max_bits=0.8))
    assert transfer.receipt.bits_per_element <= 0.8


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_wishes_are_numbers(value):
    with pytest.raises(RecipeError, match="max_bits must be a number"):
        Target(max_bits=value)


@pytest.fixture
async def strangers(tiny):
    """A sender with a profile, and a receiver of the same model without one."""
    receiver = ReceiverService(Receiver(replace(tiny, profile=None)))
    servers = [
        Server("127.0.0.1:0", receiver=receiver),
        Server("127.0.0.1:0", sender=SenderService(Sender(tiny), dial=to_receivers())),
    ]
    ports = [await server.start() for server in servers]
    async with (
        SenderClient(f"127.0.0.1:{ports[1]}") as source,
        ReceiverClient(f"127.0.0.1:{ports[0]}") as target,
    ):
        yield source, target, receiver
    for server in servers:
        await server.stop(0)


async def test_a_profile_travels_once_to_a_receiver_that_lacks_it(tiny, strangers):
    source, target, receiver = strangers
    assert (await target.capabilities()).profiles == ()
    sent = []
    put = receiver.put_profile

    async def counting(digest: bytes, total_bytes: int, pieces: AsyncIterator[bytes], caller: Caller) -> None:
        sent.append(total_bytes)
        await put(digest, total_bytes, pieces, caller)

    receiver.put_profile = counting
    for _ in range(2):
        delivery = Delivery(
            target.address, ITEM.question, "transform=1", text=ITEM.context, answer_here=True,
            target=Target(verify=True),
        )  # fmt: skip
        async for progress in source.deliver(delivery):
            last = progress
        assert tiny.profile.digest.hex() in last.receipt.recipe
        assert last.receipt.certificate.passed
        assert last.receipt.bits_per_element < 2
    assert sent == [len(tiny.profile.to_bytes())]
    assert (await target.capabilities()).profiles == (tiny.profile.digest,)


async def test_a_transfer_that_names_an_unknown_profile_is_refused(tiny, sender, context, strangers):
    _, target, _ = strangers
    transfer = sender.pack(context, ITEM.question, "transform=1")
    with pytest.raises(IdentityError, match=f"profile {tiny.profile.digest.hex()[:12]} is not here"):
        async for _ in target.push(transfer.frames):
            pass


async def test_a_receiver_takes_no_other_models_profile(random_lm, tiny, strangers):
    _, target, _ = strangers
    foreign = replace(tiny.profile, fingerprint=random_lm("qwen2", "bfloat16").fingerprint)
    with pytest.raises(IdentityError, match="another model's"):
        await target.put_profile(foreign.to_bytes())
