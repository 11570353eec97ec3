"""A context that plain transformers code has read: is this the model's own cache, of these tokens?

    cache_of    a filled DynamicCache and its token ids → a `KVCache`, checked
    prompt_of   the same ids → the text that they are, and the prompt that it stands in

A cache of another model may have the same shape. Two looks at its numbers tell most of them apart for little work.
The first layer's keys and values follow from each token and its position alone: one layer's projections show any id
that does not belong to the cache. And the last token is read once more over all the others, through every layer.
What neither sees: numbers of earlier tokens in later layers that the last token hardly attends to.

Does not know: codecs, peers. Place on the path: in the place of a prefill.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvlink.cache import KVCache
from kvlink.errors import CodecError, ContextError, KvlinkError
from kvlink.model.forward import forward, parameters
from kvlink.model.language import LanguageModel
from kvlink.model.restore import cache_shape, extract, view
from kvlink.model.template import Turn
from kvlink.payload import Prompt

_BLOCK = 1024
"""Tokens at a time through the first layer: a mask of as many rows and columns may exist at once."""
_EQUAL = {torch.float32: 1e-2, torch.float16: 0.02, torch.bfloat16: 0.03}
"""Most difference of one token's keys or values in the first layer, as a share of their norm."""
_LAST = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.2}
"""The same of the last token, over all layers: what other orders of summing grow to on their way."""


def ids_of(lm: LanguageModel, token_ids: Any) -> list[int]:
    """Token ids as a list: of integers, or a tensor `[T]` or `[1, T]`. Raises ContextError."""
    shape = getattr(token_ids, "shape", None)
    if shape is not None and len(shape) == 2 and shape[0] == 1:
        token_ids = token_ids[0]
    try:
        ids = [operator.index(i) for i in (token_ids.tolist() if shape is not None else token_ids)]
    except TypeError as error:
        raise ContextError(f"token ids are a list of integers or a tensor [1, T]: {error}") from None
    if not ids:
        raise ContextError("there are no token ids: nothing was read")
    if wrong := [i for i in ids if not 0 <= i < lm.embeddings]:
        raise ContextError(f"token id {wrong[0]} is not in the model's vocabulary of {lm.embeddings}")
    if len(ids) >= lm.window:
        raise ContextError(f"the context has {len(ids)} tokens, the model's window {lm.window}")
    return ids


def cache_of(lm: LanguageModel, past_key_values: Any, ids: Sequence[int]) -> KVCache:
    """The cache that `lm` has of `ids`; it shares the tensors of `past_key_values`.

    Raises UnsupportedCacheError (another class, a batch), ContextError (another shape, other numbers).
    """
    tokens = len(ids)
    cache = extract(past_key_values, tokens)
    _require_shape(lm, past_key_values, cache)
    try:
        cache.require_finite()
    except CodecError as error:
        raise ContextError(f"the cache cannot be used: {error}") from error
    _require_tokens(lm, cache, ids)
    _require_last(lm, cache, ids)
    return cache


def _require_shape(lm: LanguageModel, past_key_values: Any, cache: KVCache) -> None:
    """Raise ContextError unless the model would make a cache of this shape of as many tokens."""
    expected = cache_shape(lm, cache.tokens)
    windows = dict(expected.whole_layers)
    if len(cache.layers) != expected.layers:
        raise ContextError(f"the model has {expected.layers} layers, the cache {len(cache.layers)}")
    held_layers: list[Any] = past_key_values.layers
    for index, (layer, held) in enumerate(zip(cache.layers, held_layers, strict=True)):
        if layer.sliding is not (index in windows):
            raise ContextError(
                f"layer {index}: a sliding window in the {'cache' if layer.sliding else 'model'} only; "
                "a cache made with config=model.config has the right layers"
            )
        read = held.cumulative_length if layer.sliding else layer.keys.shape[1]
        if read != cache.tokens:
            raise ContextError(
                f"layer {index}: the cache is of {read} tokens, there are {cache.tokens} token ids"
                + (
                    "; generate has not read the last token that it made: leave it out"
                    if cache.tokens - read == 1
                    else ""
                )
            )
        count = windows.get(index, cache.tokens)
        found = (layer.keys.shape[0], layer.keys.shape[1], layer.keys.shape[2])
        if found != (expected.kv_heads, count, expected.head_size):
            raise ContextError(
                f"layer {index}: the model has {count} positions in {expected.kv_heads} heads of "
                f"{expected.head_size} numbers; the cache {found[1]} in {found[0]} of {found[2]}"
            )
        if {layer.keys.dtype, layer.values.dtype} != {lm.model.dtype}:
            raise ContextError(
                f"layer {index}: the model's numbers are {lm.model.dtype}, the cache's {layer.keys.dtype}"
            )


class _FoundError(Exception):
    """The first layer's keys and values are there: the rest of the forward pass is not needed."""


class _FirstLayer(DynamicCache):
    """A cache that ends the forward pass as soon as a layer has something for it."""

    found: tuple[int, Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> NoReturn:
        self.found = (layer_idx, key_states[0], value_states[0])
        raise _FoundError


def _require_tokens(lm: LanguageModel, cache: KVCache, ids: Sequence[int]) -> None:
    """Raise ContextError where the first layer's keys and values are not those of `ids` at their positions."""
    block = _BLOCK if "position_ids" in parameters(lm.model) else len(ids)
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        places = torch.arange(start, start + len(part))
        state = _FirstLayer(config=lm.model.config)
        with lm.lock, contextlib.suppress(_FoundError):
            forward(lm.model, part, state, places, torch.ones(len(part)), last_only=True)
        layer, *own = state.found
        there = cache.layers[layer]
        inside = (there.positions[0] >= start) & (there.positions[0] < start + len(part))
        at = there.positions[0][inside]
        for side, mine, theirs in zip(("keys", "values"), own, (there.keys, there.values), strict=True):
            held = theirs[:, inside.to(theirs.device)]
            apart = _difference(held.transpose(0, 1), mine[:, (at - start).to(mine.device)].transpose(0, 1))
            worst = int(apart.argmax()) if len(apart) else 0
            if len(apart) and not float(apart[worst]) <= _EQUAL[held.dtype]:
                raise ContextError(
                    f"the cache is not this model's of these token ids: at position {int(at[worst])} its first "
                    f"{side} differ from those of token {ids[int(at[worst])]} by {float(apart[worst]):.0%}"
                )


def _require_last(lm: LanguageModel, cache: KVCache, ids: Sequence[int]) -> None:
    """Raise ContextError where reading the last token over the others gives it other keys or values."""
    before = len(ids) - 1
    if not before or any(layer.sliding and layer.positions[0, 0] for layer in cache.layers):
        return  # a window that has slid no longer holds what the last token saw
    shorter = tuple(
        type(layer)(
            layer.keys[:, :before], layer.values[:, :before], layer.positions[:, :before], layer.sliding
        )
        for layer in cache.layers
    )
    state = view(lm, KVCache(shorter, before))
    with lm.lock:
        forward(lm.model, ids[before:], state, torch.tensor([before]), torch.ones(before + 1))
    apart = []
    grown: list[Any] = state.layers
    for there, own in zip(cache.layers, grown, strict=True):
        for held, mine in ((there.keys, own.keys[0]), (there.values, own.values[0])):
            apart.append(_difference(held[None, :, -1], mine[None, :, -1]))
    worst = float(torch.cat(apart).max())
    if not worst <= _LAST[cache.layers[0].keys.dtype]:
        raise ContextError(
            f"the cache is not this model's of these token ids: read again, the last token differs by {worst:.0%}"
        )


def _difference(held: Tensor, own: Tensor) -> Tensor:
    """How far `[N, …]` are apart, each as a share of its own norm, `[N]` float32."""
    held, own = held.flatten(1).float().cpu(), own.flatten(1).float().cpu()
    return (held - own).norm(dim=1) / own.norm(dim=1).clamp(min=1e-6)


def prompt_of(lm: LanguageModel, ids: Sequence[int], turns: Iterable[Turn] = ()) -> tuple[str, Prompt]:
    """The text that `ids` are, and the prompt in which it stands; "" where no text is cut into these ids.

    The template's own prompt, with `turns` before the context, where the ids follow from it; else nothing stands around
    the context, and a question continues it. Raises ContextError where `turns` are given and the ids say otherwise.
    """
    told = tuple(turns)
    own = lm.template.prompt(told)
    if text := _text_of(lm, ids, own):
        return text, own
    if told:
        raise ContextError(
            f"the token ids are not what the model's template writes for {len(told)} earlier turns and a context; "
            "without turns they are taken as they are"
        )
    whole = lm.template.continued.prompt()
    return _text_of(lm, ids, whole), whole


def _text_of(lm: LanguageModel, ids: Sequence[int], prompt: Prompt) -> str:
    """The context's text where it is cut into exactly these ids, else ""."""
    asking = lm.asking(prompt.template_id)
    opening = asking.encoder.opening if asking.template.special_tokens else []
    if list(ids[: len(opening)]) != opening:
        return ""
    written = lm.tokenizer.decode(list(ids[len(opening) :]), clean_up_tokenization_spaces=False)
    before, after = prompt.before.decode(), prompt.after.decode()
    if not (written.startswith(before) and written.endswith(after)):
        return ""
    text = written[len(before) : len(written) - len(after)]
    try:
        same = asking.context_ids(text, prompt) == list(ids)
    except KvlinkError:
        return ""
    return text if same else ""
