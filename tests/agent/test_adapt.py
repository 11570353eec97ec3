"""Recipes that adapt, certificates, and profiles that travel ahead: over real gRPC, on the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvlink.agent.adapt import INT8_GRADE, automatic, step_for
from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.errors import IdentityError, LimitError, RecipeError
from kvlink.eval.questions import generated
from kvlink.model.generate import answer
from kvlink.recipe import Recipe, Wish
from kvlink.transport.api import Delivery
from kvlink.transport.client import ReceiverClient, SenderClient
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


def test_without_a_profile_auto_is_as_fine_as_int8(tiny, context):
    plain = Sender(replace(tiny, profile=None))
    recipe = plain.recipe("auto")
    assert recipe.codec.step_code == INT8_GRADE
    found = plain.certify(context, ITEM.question, plain.pack(context, ITEM.question, recipe))
    rough = plain.certify(context, ITEM.question, plain.pack(context, ITEM.question, "int8"))
    assert found.passed
    assert rough.passed
    assert found.kl_mean < 1e-3


def test_steps_follow_what_was_measured(tiny):
    profile = replace(tiny.profile, quality=((-8, 1.0), (-4, 1.0), (0, 0.99), (4, 0.7)))
    assert step_for(profile, 1.0) == -4
    assert step_for(profile, 0.99) == 0
    assert step_for(profile, 0.5) == 4
    assert step_for(replace(profile, quality=((0, 0.5),)), 0.9) == INT8_GRADE
    assert automatic(profile).codec.step_code == 0


@pytest.mark.parametrize("bits", [0.8, 1.5, 3.0])
def test_bits_are_the_most_that_a_message_has_and_are_used(sender, context, bits):
    found = sender.pack(context, ITEM.question, "transform=1", Wish(max_bits=bits)).receipt.bits_per_element
    assert 0.75 * bits < found <= bits
    selected = sender.pack(context, ITEM.question, "q2c@0.5 transform=1", Wish(max_bits=bits))
    assert selected.receipt.bits_per_element <= bits
    assert selected.manifest.recipe.codec.step_code < 0 or bits < 1


def test_a_budget_takes_all_positions_where_they_fit_and_chooses_where_not(sender, context):
    whole = sender.pack(context, ITEM.question, "transform=1")
    size = whole.receipt.wire_bytes
    roomy = sender.pack(context, ITEM.question, "transform=1", Wish(budget_bytes=size))
    assert roomy.receipt.kept_tokens == context.cache.tokens
    tight = sender.pack(context, ITEM.question, "transform=1", Wish(budget_bytes=size // 3))
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
        transfer = sender.pack(context, ITEM.question, recipe, Wish(verify=True))
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
    ("recipe", "wish", "error", "message"),
    [
        ("int4", Wish(max_bits=2), RecipeError, "a number of bits needs a recipe with a step"),
        ("int4", Wish(quality=0.9), RecipeError, "a quality needs a recipe with a step"),
        ("transform=1", Wish(quality=2), RecipeError, "quality must be above 0 and at most 1"),
        ("transform=1", Wish(max_bits=0.0001), LimitError, "no step brings this context down to 0.0001 bits"),
        ("transform=1", Wish(budget_bytes=500), LimitError, "no cache fits 500 bytes"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(sender, context, recipe, wish, error, message):
    with pytest.raises(error, match=message):
        sender.pack(context, ITEM.question, recipe, wish)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_wishes_are_numbers(value):
    with pytest.raises(RecipeError, match="max_bits must be a number"):
        Wish(max_bits=value)


@pytest.fixture
async def strangers(tiny):
    """A sender with a profile, and a receiver of the same model without one."""
    receiver = ReceiverService(Receiver(replace(tiny, profile=None)))
    servers = [
        Server("127.0.0.1:0", receiver=receiver),
        Server("127.0.0.1:0", sender=SenderService(Sender(tiny))),
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

    async def counting(data: bytes) -> bytes:
        sent.append(len(data))
        return await put(data)

    receiver.put_profile = counting
    for _ in range(2):
        wish = Wish(verify=True)
        delivery = Delivery(
            target.address, ITEM.question, "transform=1", text=ITEM.context, answer_here=True, wish=wish
        )
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
