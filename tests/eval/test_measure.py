"""One question by many cases: the oracle is the full cache, masking, and the bytes of real frames."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import ContextError
from kvlink.eval.measure import Bench
from kvlink.eval.questions import Item, Query, generated
from kvlink.eval.tables import Case, plan
from kvlink.model.generate import answer
from kvlink.transport.link import grpc_bytes


@pytest.fixture(scope="module")
def item():
    return next(generated(11))


@pytest.fixture(scope="module")
def bench(tiny):
    return Bench(tiny)


def measured(bench, item, *cases):
    outcomes = bench.measure(item, cases)["outcomes"]
    return [outcomes[case.key] for case in cases]


@pytest.mark.parametrize("recipe", ["raw", "lossless", "text", "q2c@1.0 raw"])
def test_what_loses_nothing_diverges_by_nothing(bench, item, recipe):
    (found,) = measured(bench, item, Case(recipe))
    assert found["kl"] == found["kl_most"] == 0
    assert found["answer"] == found["own_answer"]
    assert found["f1"] == found["f1_full"]


def test_bytes_are_those_of_the_frames(tiny, bench, item):
    (found,) = measured(bench, item, Case("q2c@0.5 int4"))
    sender = Sender(tiny)
    transfer = sender.pack(sender.read(item.context), item.question, "q2c@0.5 int4")
    sizes = [len(frame) for frame in transfer.frames]
    assert transfer.receipt.wire_bytes == sum(sizes), "no link has added to it"
    assert found["wire_bytes"] == sum(sizes) + grpc_bytes(sizes)
    shape = transfer.manifest.shape
    assert found["bits_per_element"] == pytest.approx(8 * found["wire_bytes"] / shape.element_count)
    assert found["kept_tokens"] == transfer.receipt.kept_tokens


def test_answers_are_those_that_generation_gives(tiny, bench):
    """What is told from one pass along the sender's answer is what a token at a time gives."""
    sender, receiver = Sender(tiny), Receiver(tiny)
    recipes = ("raw", "int8", "int3", "int2", "int1", "q2c@0.25 int4", "snapkv@0.5 raw", "transform=2")
    for item in itertools.islice(generated(14), 6):
        found = measured(bench, item, *(Case(recipe) for recipe in recipes))
        context = sender.read(item.context)
        for recipe, outcome in zip(recipes, found, strict=True):
            held = receiver.receive(sender.pack(context, item.question, recipe).frames)
            assert outcome["answer"] == receiver.answer(held, item.question).text, recipe


def test_divergence_grows_as_bits_shrink(bench, item):
    found = measured(bench, item, *(Case(f"int{bits}") for bits in (8, 4, 3, 2, 1)))
    divergence = [outcome["kl"] for outcome in found]
    assert divergence == sorted(divergence)
    assert 0 < divergence[0] < 1e-3 < divergence[-1]


def test_the_choice_is_made_for_the_first_question_whatever_is_asked(tiny, bench, item):
    cases = [Case("q2c@0.1 raw", shift) for shift in ("same", "paraphrase", "entity", "unrelated")]
    found = measured(bench, item, *cases)
    assert len({outcome["wire_bytes"] for outcome in found}) == 1, "one transfer serves them all"
    sender = Sender(tiny)
    context = sender.read(item.context)
    for case, outcome in zip(cases, found, strict=True):
        own = answer(tiny, context.cache, item.query(case.shift).question)
        assert outcome["own_answer"] == own.text, "the reference is asked the same question"


def test_shifts_that_an_item_lacks_are_left_out(bench):
    item = Item("Jand Faris was born in Nibo.", "Where was Jand Faris born?", ("Nibo",))
    lines = bench.measure(item, [Case("raw"), Case("raw", "paraphrase"), Case("raw", "unrelated")])
    assert list(lines["outcomes"]) == [Case("raw").key]


def test_masking_is_pruning_and_zeroing_changes_nothing(checkpoint, item):
    from kvlink.model.loading import load

    exact = Bench(load(dtype="float32"))
    recipe = "q2c@0.25 raw"
    pruned, masked, zeroed = measured(
        exact, item, Case(recipe), Case(recipe, kind="masked"), Case(recipe, kind="masked", zeroed=True)
    )
    assert zeroed["more"]["logit_error"] == 0
    assert masked["more"]["logit_error"] < 2e-3
    assert pruned["answer"] == masked["answer"] == zeroed["answer"]
    assert masked["kl"] == zeroed["kl"] == pytest.approx(pruned["kl"], rel=1e-2, abs=1e-6)


def test_what_a_second_question_adds_is_less_than_a_transfer_of_its_own(tiny, bench, item):
    recipe = "q2c+draft@0.25 transform=0.5 rest=2"
    kinds = ("answer", "whole", "added")
    first, whole, added = measured(bench, item, *(Case(recipe, "unrelated", kind) for kind in kinds))
    assert first["wire_bytes"] > added["wire_bytes"] < whole["wire_bytes"]
    assert added["more"]["of_first"] == added["wire_bytes"] / first["wire_bytes"]
    assert added["kl"] < first["kl"], "it is finer where this question looks"


def test_the_spectrum_is_the_share_of_the_largest_singular_values(tiny, bench, item):
    (found,) = measured(bench, item, Case("raw", kind="spectrum"))
    layer = Sender(tiny).read(item.context).cache.layers[2]
    matrix = layer.values.float().transpose(0, 1).reshape(layer.values.shape[1], -1)
    energy = torch.linalg.eigvalsh(matrix.T @ matrix).flip(0).clamp(min=0)
    most = round(0.05 * len(energy))
    assert found["more"]["values/2"] == pytest.approx(float(energy[:most].sum() / energy.sum()), rel=1e-3)
    assert len(found["more"]) == 2 * len(tiny.model.model.layers)


def test_a_low_rank_says_what_energy_it_kept(bench, item):
    found = measured(bench, item, *(Case(f"svd={rank} raw") for rank in (8, 16, 32, 64)))
    for side in ("energy_keys", "energy_values"):
        shares = [outcome["more"][side] for outcome in found]
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] < 1
    wire = [outcome["wire_bytes"] for outcome in found]
    assert wire == sorted(wire)
    assert wire[3] / wire[0] == pytest.approx(8, rel=0.02), "both factors are in the bytes"


def test_answers_are_scored_by_the_data_sets_rules(bench):
    context = (
        "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening."
    )
    question = "What instrument does Jand Faris play?"
    squad = Item(context, question, ("cel-lo",), rules="squad")
    trivia = Item(context, question, ("cel-lo", "Cello!"), rules="trivia")
    assert measured(bench, squad, Case("raw"))[0]["em"] == 1.0
    assert measured(bench, trivia, Case("raw"))[0]["em"] == 1.0
    assert measured(bench, Item(context, question, ("cel-lo",), rules="trivia"), Case("raw"))[0]["em"] == 0.0


def test_a_context_larger_than_the_window_is_refused(bench):
    with pytest.raises(ContextError, match="the model's window"):
        bench.measure(Item("word " * 9000, "Q?", ("a",)), [Case("raw")])


def test_every_case_of_the_tables_can_be_measured(bench):
    """All of them on one short context: nothing in the plan is only a plan."""
    item = next(item for item in itertools.islice(generated(3, (4, 6)), 50) if item.entity and item.unrelated)
    item = Item(
        item.context, item.question, item.answers, item.paraphrases, "", item.entity, Query("Who?", ("x",))
    )
    cases = list(dict.fromkeys(case for cases in plan("all").values() for case in cases))
    line = bench.measure(item, cases)
    assert set(line["outcomes"]) == {case.key for case in cases}
    for key, outcome in line["outcomes"].items():
        assert 0 <= outcome["f1"] <= 1, key
        assert outcome["kl"] >= 0, key


def test_of_a_line_that_is_cut_what_has_closed_is_answered_from(bench, item):
    """In one segment a cut is the end of it; in tiers more bytes are more positions."""
    cuts = (0.1, 0.5, 0.9)
    at_once = measured(bench, item, *(Case("int8", cut=cut) for cut in cuts))
    assert [found["more"]["answered"] for found in at_once] == [0, 0, 0]
    assert not any(found["agrees"] for found in at_once)
    tiers = measured(bench, item, *(Case("int8", cut=cut, tiers=True) for cut in cuts))
    shares = [found["more"]["kept_share"] for found in tiers]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    whole = measured(bench, item, Case("int8"))[0]["wire_bytes"]
    assert [found["wire_bytes"] < cut * whole * 1.1 for found, cut in zip(tiers, cuts, strict=True)] == [
        True
    ] * 3
