"""Recipes: three forms that say the same, and errors that name the word."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlink
from kvlink.agent.settings import SenderSettings
from kvlink.cli.files import pack as pack_file
from kvlink.codecs import (
    BARE,
    STEP_CODES,
    LayerOverride,
    LowRank,
    Quantized,
    Quantizer,
    Transform,
    codec_from,
)
from kvlink.errors import RecipeError
from kvlink.recipe import AUTO, PRESETS, Recipe
from kvlink.selection import NAMED, Amount, Selection
from kvlink.transport.api import Delivery, Fetch

ratios = st.floats(0.001, 1.0)
amounts = st.one_of(
    ratios.map(Amount),
    ratios.map(lambda x: Amount(x, "mass")),
    st.integers(1, 10**6).map(lambda n: Amount(n, "count")),
    st.integers(1, 10**9).map(lambda n: Amount(n, "bytes")),
)


@st.composite
def quantizers(draw, lossless: bool = True):
    bits = draw(st.sampled_from([16, 8, 4, 3, 2, 1]))
    if bits == 16:
        return Quantizer(lossless=lossless and draw(st.booleans()))
    axis = draw(st.sampled_from(["token", "channel"]))
    return Quantizer(bits, axis, draw(st.integers(2, 512)), draw(st.booleans()))


@st.composite
def recipes(draw):
    if draw(st.integers(0, 9)) == 0:
        return Recipe(mode="text")
    method = draw(st.sampled_from(NAMED))
    selection = Selection()
    if method != "all":
        when = draw(st.sampled_from(["after", "during"]))
        selection = Selection(
            method,
            draw(amounts),
            "shared" if when == "during" else draw(st.sampled_from(["shared", "head"])),
            when,
            draw(st.integers(0, 64)),
            draw(st.integers(0, 64)),
            draw(st.integers(0, 8)) * 2 + 1,
            draw(st.integers(1, 128)),
            draw(st.integers(0, 2**31 - 1)),
        )
    coder = draw(st.sampled_from(["identity", "zstd"]))
    codec, background = draw(codecs()), None
    if selection.method != "all" and selection.when == "after" and draw(st.booleans()):
        if isinstance(codec, Transform):
            background = replace(codec, step_code=draw(st.integers(codec.step_code, STEP_CODES[1])))
        elif isinstance(codec, Quantized):
            background = codec_from({BARE: f"int{min(codec.keys.bits, draw(st.sampled_from([4, 2, 1])))}"})
            background = None if background.keys.bits > codec.keys.bits else background
    return Recipe("kv", selection, codec, coder, background)


@st.composite
def codecs(draw):
    """Any codec."""
    if draw(st.integers(0, 3)) == 0:
        step = draw(st.integers(*STEP_CODES))
        return Transform(step, draw(st.sampled_from(["auto", "own", "ab" * 16])))
    rank = draw(st.sampled_from([0, 0, 8]))
    kinds = quantizers(lossless=not rank)
    overrides = tuple(
        LayerOverride(layer, draw(kinds), draw(kinds))
        for layer in sorted(draw(st.sets(st.integers(0, 40), max_size=2)))
    )
    quantized = Quantized(draw(kinds), draw(kinds), overrides)
    return LowRank(rank, quantized) if rank else quantized


@given(recipes())
def test_the_full_notation_means_the_recipe(recipe):
    assert Recipe.parse(str(recipe)) == recipe


@given(recipes())
def test_getting_finer_ends_with_every_bit_of_every_position(recipe):
    steps = 0
    while (finer := recipe.finer()) is not None and steps < 40:
        assert finer != recipe
        recipe, steps = finer, steps + 1
    assert steps < 40
    assert recipe.mode == "text" or (recipe.codec.exact and not recipe.prunes)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_mean_what_their_full_notation_says(preset):
    assert Recipe.parse(str(Recipe.parse(preset))) == Recipe.parse(preset)


def test_the_order_of_words_does_not_matter():
    assert Recipe.parse("int4 scope=head q2c@0.5") == Recipe.parse("q2c@0.5 int4 scope=head")


def test_defaults_of_a_short_word():
    recipe = Recipe.parse("int4")
    assert str(recipe.codec.keys) == "int4/channel/g64/asym"
    assert str(recipe.codec.values) == "int4/token/g64/asym"


def test_layers_can_be_finer():
    recipe = Recipe.parse("int4 layers=0:int8;3:lossless")
    assert recipe.codec.of_layer(0, "keys").bits == 8
    assert recipe.codec.of_layer(1, "keys").bits == 4
    assert recipe.codec.of_layer(3, "values").lossless


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("0.25", Amount(0.25)),
        ("128tok", Amount(128, "count")),
        ("mass:0.9", Amount(0.9, "mass")),
        ("200kB", Amount(200_000, "bytes")),
        ("1.5MB", Amount(1_500_000, "bytes")),
        ("900B", Amount(900, "bytes")),
    ],
)
def test_amounts(text, amount):
    assert Amount.parse(text) == amount
    assert Amount.parse(str(amount)) == amount


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("bogus", "expected raw, lossless or int8"),
        ("int5", "int5"),
        ("q2c@0 int4", "above 0 and at most 1, got 0"),
        ("q2c@1.5 int4", "above 0 and at most 1, got 1.5"),
        ("q2c@-0.5 int4", "got -0.5"),
        ("q2c@nan", "must look like"),
        ("q2c@1e999", "finite"),
        ("q2c@0tok", "at least 1"),
        ("q2c@1.5tok", "whole number"),
        ("q2c@0.2xB", "must look like"),
        ("q2c int4", "q2c needs an amount"),
        ("q3c@0.5", "unknown selection 'q3c'"),
        ("int4 int8", "given twice"),
        ("int4 text", "text stands alone"),
        ("int4 scope=all", "scope must be one of"),
        ("q2c@0.5 scope=head when=during", "needs scope=shared"),
        ("int4 window=5", "selection options without a selection"),
        ("q2c@0.5 pool=4", "pool must be odd"),
        ("int4/diagonal", "unknown quantizer option"),
        ("int4/g1", "group must be"),
        ("int4 svd=x", "svd must be a whole number"),
        ("int4 coder=gzip", "coder must be one of"),
        ("int4 layers=3:int8;1:int8", "in order"),
        ("int4 layers=x:int8", "layers must be a whole number"),
        ("lossless svd=8", "exclude each other"),
        ("lossless/g4", "takes no options"),
        ("int4 speed=9", "unknown word"),
    ],
)
def test_wrong_recipes_are_refused_by_the_word_that_is_wrong(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


@given(st.text(max_size=40))
def test_arbitrary_text_raises_only_recipe_errors(text):
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("piece", ["int8 ", "0:int8;", "q2c@", "[", '{"a":', " "])
def test_a_recipe_is_short(piece):
    """Refused for its length before a word of it is looked at, and the error is short too."""
    for size in (70_000, 20_000_000):
        with pytest.raises(RecipeError, match=r"has at most [\d,]+ characters") as caught:
            Recipe.parse(piece * (size // len(piece)))
        assert len(str(caught.value)) < 200


def test_every_layer_of_a_large_model_may_have_quantizers_of_its_own():
    finest = Quantizer(4, "channel", 64)
    overrides = tuple(LayerOverride(layer, finest, replace(finest, axis="token")) for layer in range(126))
    recipe = Recipe(codec=Quantized(overrides=overrides))
    assert Recipe.parse(str(recipe)) == recipe


def test_who_names_no_recipe_gets_the_same_one_everywhere():
    defaults = (
        inspect.signature(kvlink.pack).parameters["recipe"].default,
        inspect.signature(kvlink.Sender.pack).parameters["recipe"].default,
        SenderSettings().default_recipe,
        inspect.signature(pack_file).parameters["recipe"].default,
    )
    assert set(defaults) == {AUTO}
    assert Delivery("127.0.0.1:1", "Who?").recipe == Fetch("id").recipe == "", "left to the sender's settings"
