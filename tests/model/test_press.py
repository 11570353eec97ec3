"""Scores of a kvpress class, by a stand-in: called as its own hook would call it, or refused by name.

The real package needs another transformers; `benchmarks/kvpress_scores.py` compares with it.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from kvlink.agent.sender import Sender
from kvlink.errors import ConfigError, RecipeError
from kvlink.model.prefill import prefill, read_press
from kvlink.recipe import Recipe
from tests.conftest import random_ids

TOKENS = 60
THREE_TIMES = "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. " * 3


class KnormPress:
    """Keeps keys with a small norm, as the press of that name does."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] == keys.shape[2] == values.shape[2] == TOKENS
        assert kwargs["past_key_values"].layers[module.layer_idx].keys is keys
        assert "position_embeddings" in kwargs
        return -keys.norm(dim=-1)


class SetUpPress(KnormPress):
    def post_init_from_model(self, model):
        self.layers = model.config.num_hidden_layers

    def score(self, module, *arguments):
        assert self.layers == 4
        return super().score(module, *arguments)


class FlatPress(KnormPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.norm(dim=-1)[0]


class AngryPress(KnormPress):
    def score(self, *arguments):
        raise RuntimeError("no")


class ArgumentsPress(KnormPress):
    def __init__(self, press):
        self.press = press


class NoPress:
    pass


@pytest.fixture
def kvpress(monkeypatch):
    module = types.ModuleType("kvpress")
    for kind in (KnormPress, SetUpPress, FlatPress, AngryPress, ArgumentsPress, NoPress):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "kvpress", module)


@pytest.mark.parametrize("name", ["KnormPress", "SetUpPress"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3"])
def test_scores_are_those_of_the_class_over_the_prefilled_keys(random_lm, kvpress, architecture, name):
    lm = random_lm(architecture)
    ids = random_ids(TOKENS)
    found = read_press(lm, ids, name)
    expected = torch.stack([-layer.keys.norm(dim=-1) for layer in prefill(lm, ids).layers])
    assert torch.equal(found.press, expected)


def test_layers_with_a_sliding_window_are_not_scored(random_lm, kvpress):
    found = read_press(random_lm("gemma3-sliding"), random_ids(TOKENS), "KnormPress")
    assert found.press[0].abs().max() == 0, "a sliding layer"
    assert found.press[1].abs().max() > 0


def test_a_press_selects_like_any_other_method(tiny, kvpress, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", len(tiny.context_ids(THREE_TIMES)))
    sender = Sender(tiny)
    context = sender.read(THREE_TIMES)
    transfer = sender.pack(context, "", "press:KnormPress@0.5 int8 scope=head sinks=0 recent=0")
    assert transfer.receipt.kept_tokens == -(-context.cache.tokens // 2)
    assert "press:KnormPress@0.5" in transfer.receipt.recipe
    assert Recipe.parse(transfer.receipt.recipe) == transfer.manifest.recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MissingPress", "kvpress has no class MissingPress with a score method"),
        ("NoPress", "kvpress has no class NoPress with a score method"),
        ("ArgumentsPress", "kvpress ArgumentsPress cannot be made without arguments"),
        ("AngryPress", r"kvpress AngryPress cannot score layer 0: RuntimeError\('no'\)"),
        ("FlatPress", r"kvpress FlatPress: expected scores \(1, 2, 60\), got \(2, 60\)"),
    ],
)
def test_what_cannot_score_is_refused_by_name(random_lm, kvpress, name, message):
    with pytest.raises(ConfigError, match=message):
        read_press(random_lm(), random_ids(TOKENS), name)


def test_without_the_package_the_error_says_so(random_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ConfigError, match="press:KnormPress needs the package kvpress"):
        read_press(random_lm(), random_ids(TOKENS), "KnormPress")


@pytest.mark.parametrize(
    "text", ["press:@0.5", "press:a.b@0.5", "press:__import__@0.5", "press:Knorm Press@0.5"]
)
def test_a_press_is_named_by_a_plain_class_name(text):
    with pytest.raises(RecipeError):
        Recipe.parse(text)
