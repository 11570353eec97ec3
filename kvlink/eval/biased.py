"""A model with Qwen-like key biases: large constants in the keys of its first and last layer.

Published Qwen2.5 models carry such constants; quantizers that share a scale over a token's channels
spend it on them. They sit on the slowest rotary pairs, which turn so little over a context that a
constant shifts all logits of a query alike, and attention does not see it.

Does not know: codecs. Place on the path: before a run that asks for the variant.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch

from kvlink.errors import UnsupportedCacheError
from kvlink.eval.questions import generated
from kvlink.model.calibrate import build_profile
from kvlink.model.loading import LanguageModel, wrap
from kvlink.model.prefill import attention_layers

PAIRS = 4
SIZE = 60.0
"""Of the constants; keys of the embedded model are a few units wide."""

_PROFILE_TEXTS = 40
_PROFILE_SEED = 1001


def biased(lm: LanguageModel) -> LanguageModel:
    """A copy of the model with the constants in it, with a profile of its own where the model has one.

    Raises UnsupportedCacheError where the model has no key projection with a bias.
    """
    model = copy.deepcopy(lm.model)
    layers = attention_layers(model)
    with torch.no_grad():
        for module in (layers[0], layers[-1]):
            _add(module)
    twin = replace(wrap(lm.name, model, lm.tokenizer), template=lm.template)
    if lm.profile is None:
        return twin
    texts = [item.context for item in itertools.islice(generated(_PROFILE_SEED), _PROFILE_TEXTS)]
    profile = build_profile(twin, texts, lambda: None)
    return replace(twin, profile=profile)


def _add(module: Any) -> None:
    bias = getattr(getattr(module, "k_proj", None), "bias", None)
    if bias is None:
        raise UnsupportedCacheError("the biased variant needs a model whose k_proj has a bias, such as Qwen2")
    rows = bias.view(-1, module.head_dim)
    half = module.head_dim // 2
    constants = SIZE * torch.tensor([1.0, -1.0] * (PAIRS // 2)).to(bias)
    rows[:, half - PAIRS : half] += constants
    rows[:, -PAIRS:] += constants
