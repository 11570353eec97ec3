"""Qwen-like key biases: they break quantizers that share a scale over channels, and not the transform."""

from __future__ import annotations

import itertools
import statistics

import pytest

from kvlink.errors import UnsupportedCacheError
from kvlink.eval.biased import SIZE, biased
from kvlink.eval.measure import Bench
from kvlink.eval.questions import generated
from kvlink.eval.tables import Case
from kvlink.model.prefill import prefill

PER_TOKEN = "keys=int4/token values=int4/token"
RECIPES = (PER_TOKEN, "int4", "transform=1", "transform=1 basis=own")


@pytest.fixture(scope="module")
def found(tiny):
    """Agreement, bits and KL by variant and recipe."""
    out = {}
    for name, lm in (("plain", tiny), ("biased", biased(tiny))):
        bench = Bench(lm)
        lines = [
            bench.measure(item, [Case(recipe) for recipe in RECIPES])["outcomes"]
            for item in itertools.islice(generated(33), 8)
        ]
        for recipe in RECIPES:
            outcomes = [line[Case(recipe).key] for line in lines]
            out[name, recipe] = {
                key: statistics.fmean(o[key] for o in outcomes)
                for key in ("agrees", "bits_per_element", "kl")
            }
    return out


def test_int4_per_token_fails_on_biased_keys_only(found):
    assert found["plain", PER_TOKEN]["agrees"] >= 0.85
    assert found["biased", PER_TOKEN]["agrees"] <= 0.6
    assert found["biased", PER_TOKEN]["kl"] > 20 * found["plain", PER_TOKEN]["kl"]


@pytest.mark.parametrize("recipe", ["transform=1", "transform=1 basis=own"])
def test_the_transform_does_not_see_them(found, recipe):
    plain, other = found["plain", recipe], found["biased", recipe]
    assert other["agrees"] >= 0.85
    assert abs(plain["bits_per_element"] - other["bits_per_element"]) < 0.3
    assert other["kl"] < 3 * plain["kl"] + 0.02


def test_the_constants_are_in_the_keys_of_the_first_and_last_layer(tiny):
    ids = tiny.context_ids("Jand Faris was born in Nibo.")
    plain, other = prefill(tiny, ids), prefill(biased(tiny), ids)
    for index, (mine, theirs) in enumerate(zip(plain.layers, other.layers, strict=True)):
        largest = float((theirs.keys.float() - mine.keys.float()).abs().max())
        assert (largest > SIZE / 2) is (index in (0, 3)), index


def test_a_model_without_key_biases_has_no_such_variant(random_lm):
    with pytest.raises(UnsupportedCacheError, match="k_proj has a bias"):
        biased(random_lm("llama"))
