"""Rotations: the arrangement that a model uses is found whatever it is, against arithmetic done by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvlink.model.calibrate import rotation
from kvlink.model.prefill import prefill
from kvlink.model.rotary import Arrangement, Rotation, find, rotations, trial_places
from tests.sweep.families import make


@pytest.mark.parametrize(
    ("layout", "start", "backwards"), list(itertools.product(("halves", "neighbours"), (0, 6), (False, True)))
)
def test_a_rotation_is_a_complex_product_of_each_pair(layout, start, backwards):
    arrangement = Arrangement("x", "", layout, start, backwards)
    angle = torch.rand(30, 3, dtype=torch.float64)
    turn = Rotation(angle.cos(), angle.sin(), *arrangement.pairs(3))
    keys, places = torch.randn(2, 5, 12, dtype=torch.float64), torch.randint(0, 30, (2, 5))
    on = turn.on(keys, places)
    for i in range(3):
        a, b = (start + i, start + i + 3) if layout == "halves" else (start + 2 * i, start + 2 * i + 1)
        sign = -1 if backwards else 1
        product = torch.complex(keys[..., a], keys[..., b]) * torch.exp(1j * sign * angle[places][..., i])
        assert torch.allclose(on[..., a], product.real)
        assert torch.allclose(on[..., b], product.imag)
    untouched = [c for c in range(12) if not start <= c < start + 6]
    assert torch.equal(on[..., untouched], keys[..., untouched])
    assert torch.allclose(turn.off(on, places), keys)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {("halves", False)}),
        ("cohere", {("neighbours", False)}),
        ("gptj", {("neighbours", False)}),
        ("glm4", {("neighbours", False)}),
        ("nanochat", {("halves", True)}),
        ("smollm3", {("halves", False), None}),
        ("bloom", {None}),
        ("gpt2", {None}),
    ],
)
def test_unrotated_keys_are_the_models_own_before_rotation(family, expected):
    """The oracle: the key projection of the first layer, taken by a hook, or keys at position 0."""
    model = make(family).eval()
    places = trial_places(512)
    cache = DynamicCache()
    given = {"input_ids": torch.full((len(places), 1), 7), "past_key_values": cache}
    if family != "bloom":
        given["position_ids"] = places[:, None]
    with torch.inference_mode():
        model(**given)
    keys = [layer.keys[:, :, 0] for layer in cache.layers]
    found = find(model, keys, places)
    assert {(a.layout, a.backwards) if a.source else None for a in found} == expected
    if family != "gpt2":
        for turn, layer in zip(rotations(model, found, 512), keys, strict=True):
            plain = turn.off(layer.double().transpose(0, 1), places.expand(layer.shape[1], -1))
            assert torch.allclose(plain, plain[:, :1].expand_as(plain), atol=1e-3 * float(plain.abs().max()))


def test_a_models_own_keys_before_rotation_by_a_hook(random_lm):
    lm = random_lm("llama")
    seen = {}
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, out, at=at: seen.update({at: out}))
        for at, layer in enumerate(lm.model.model.layers)
    ]
    cache = prefill(lm, list(range(10, 50)))
    for handle in handles:
        handle.remove()
    for at, (turn, layer) in enumerate(zip(rotation(lm, 40), cache.layers, strict=True)):
        own = seen[at][0].reshape(40, 2, 16).transpose(0, 1).double()
        assert torch.allclose(turn.off(layer.keys.double(), layer.positions), own, atol=1e-5)


def test_keys_that_no_arrangement_explains_are_not_guessed():
    model = make("llama").eval()
    places = trial_places(512)
    assert find(model, [torch.randn(len(places), 2, 16)], places) == [None]


def test_places_reach_the_end_of_the_window():
    for window in (2, 9, 512, 131_072, 2**31):
        places = trial_places(window)
        assert places[0] == 0
        assert int(places[-1]) <= window - 1
        assert window > 2**17 or int(places[-1]) == window - 1
