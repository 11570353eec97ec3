"""Exchange with plain transformers code: what `model.generate` needs to go on from a cache.

A whole cache is a `DynamicCache` like any other. One of fewer positions is not: transformers takes the number of
keys for the position of the next token, and says nothing. `generate_inputs` gives the positions along, so
that both are used in the same way:

    inputs = generate_inputs(lm, cache, question)
    tokens = lm.model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1]:]

Does not know: codecs, peers. Place on the path: beside `generate`, for those who bring their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvlink.cache import KVCache
from kvlink.errors import ContextError
from kvlink.model.forward import parameters
from kvlink.model.language import LanguageModel
from kvlink.model.restore import view

MOST_BEAMS = 1024
_CACHE = "past_key_values"


def to_dynamic_cache(lm: LanguageModel, cache: KVCache) -> DynamicCache:
    """A transformers cache of the whole context, for one generation; it shares the tensors of `cache`.

    Raises ContextError where positions are missing.
    """
    if not cache.whole:
        kept = min(layer.positions.shape[1] for layer in cache.layers if not layer.sliding)
        raise ContextError(
            f"the cache holds {kept} of {cache.tokens} positions: generating from it alone would take the number "
            "of its keys for the next position, and be silently wrong; use model.generate(**generate_inputs(question))"
        )
    return view(lm, cache)


class GenerateInputs(Mapping[str, Any]):
    """Arguments for `model.generate(**inputs)`, as often as one likes: a generation fills its cache, so that each gets
    a new one."""

    def __init__(self, given: Mapping[str, Any], new_cache: Callable[[], DynamicCache]) -> None:
        self._given, self._new_cache = {**given, _CACHE: None}, new_cache

    def __getitem__(self, name: str) -> Any:
        return self._new_cache() if name == _CACHE else self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def generate_inputs(lm: LanguageModel, cache: KVCache, question: str, beams: int = 1) -> GenerateInputs:
    """The arguments with which `model.generate` answers `question` from `cache`, which stays as it is.

    `input_ids` `[1, Q]`: the question alone, so that the answer begins at column Q of the output.
    `attention_mask` `[1, T + Q]` and `position_ids` `[1, Q]` count from the context's own length T, not from the
    positions that are held. `past_key_values`: `beams` copies, for `num_beams` or `num_return_sequences`.
    Raises ContextError where the question is empty or the window too small, UnsupportedCacheError.
    """
    if not 1 <= beams <= MOST_BEAMS:
        raise ContextError(f"beams must be from 1 to {MOST_BEAMS}, got {beams}")
    ids, tokens, device = lm.question_ids(question, cache.tokens), cache.tokens, lm.model.device

    def new_cache() -> DynamicCache:
        made = view(lm, cache)
        if beams > 1:
            made.batch_repeat_interleave(beams)
        return made

    mask = torch.ones(1, tokens + len(ids), dtype=torch.long)
    if (visible := getattr(view(lm, cache), "visible", None)) is not None:
        mask[0, :tokens] = visible
    given: dict[str, Any] = {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": mask.to(device),
        "position_ids": torch.arange(tokens, tokens + len(ids), device=device)[None],
        # Some configurations say no: the question would then be read again at every step, into the same cache.
        "use_cache": True,
    }
    if "position_ids" not in parameters(lm.model):
        del given["position_ids"]
    return GenerateInputs(given, new_cache)
