"""Prefill and evidence: reading a context, and seeing what a question attends to in it.

Evidence is captured from the attention of a few queries at a time over cached keys; a T×T matrix
never exists. The capture runs the eager attention, one block of queries at a time, and reduces
each layer's weights as soon as they appear.

Does not know: selection rules, codecs, peers. Place on the path: first at the sender.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvlink.cache import Evidence, KVCache
from kvlink.errors import ConfigError, ModelError, UnsupportedCacheError
from kvlink.model.forward import forward
from kvlink.model.language import LanguageModel
from kvlink.model.restore import extract, view

MASS_BLOCK = 128
"""Queries at a time while accumulated attention is captured: Hq·128·T weights exist at once."""


def prefill(
    lm: LanguageModel,
    ids: Sequence[int],
    kept: Tensor | None = None,
    on_layer: Callable[[int, int], object] | None = None,
) -> KVCache:
    """Read token `ids` and return their cache. `on_layer` is told how many layers of how many are done.

    `kept` `[K]` int64, ascending: read only these tokens, at their own positions (construction-
    time selection: kept tokens never see the others). Not for sliding windows, which count
    tokens by index.
    """
    tokens = len(ids)
    if kept is None:
        with lm.lock, _followed(lm, on_layer):
            return extract(_forward(lm, ids, new_cache(lm), 0, seen=0), tokens)
    cache = new_cache(lm)
    if any(layer.is_sliding for layer in cache.layers):
        raise UnsupportedCacheError("when=during is not possible on a model with sliding-window layers")
    chosen = [ids[i] for i in kept.tolist()]
    _forward(lm, chosen, cache, 0, seen=0, positions=kept)
    return extract(cache, tokens, kept)


@contextmanager
def _followed(lm: LanguageModel, on_layer: Callable[[int, int], object] | None) -> Iterator[None]:
    """Tell `on_layer` of each layer that the model has gone through. Hold `lm.lock`."""
    layers = attention_layers(lm.model) if on_layer is not None else []

    def hook(number: int) -> Callable[..., None]:
        def told(*_: object) -> None:
            if on_layer is not None:
                on_layer(number, len(layers))

        return told

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prefill_more(lm: LanguageModel, cache: KVCache, ids: Sequence[int]) -> KVCache:
    """Read token `ids` behind those of a full `cache`, which stays as it is; the cache of both."""
    grown = _forward(lm, ids, view(lm, cache), cache.tokens, seen=cache.tokens)
    return extract(grown, cache.tokens + len(ids))


def read_question(
    lm: LanguageModel, cache: KVCache, question: Sequence[int], draft: Sequence[int] = ()
) -> Evidence:
    """The attention that context tokens receive from a question and a drafted answer.

    One forward of the Q + draft tokens over the cached keys. `[L, Hkv, T]` each.
    """
    with lm.lock, _captured(lm) as seen:
        _forward(lm, [*question, *draft], view(lm, cache), cache.tokens, seen=cache.tokens, weights=True)
    asked = len(question)
    rows = [_grouped(layer, cache) for layer in seen.weights(len(cache.layers))]
    drafted = None
    if draft:
        drafted = torch.stack([_over_context(r[:, asked:].mean(1), cache, i) for i, r in enumerate(rows)])
    return Evidence(
        question=torch.stack([_over_context(r[:, :asked].mean(1), cache, i) for i, r in enumerate(rows)]),
        draft=drafted,
        question_tokens=asked,
        draft_tokens=len(draft),
    )


def read_context(
    lm: LanguageModel, ids: Sequence[int], needs: Collection[str], window: int, question: Sequence[int] = ()
) -> Evidence:
    """Evidence from reading the context once more, in blocks of queries.

    `needs`: `window` (SnapKV) and `mass` (H2O), which only the context gives; `asked_window`, whose
    window ends with the tokens of `question`. A window is at most a quarter of what is read, rounded up.
    """
    tokens, asked = len(ids), [*ids, *question] if "asked_window" in needs else list(ids)
    window = max(1, min(window, -(-len(asked) // 4)))
    inside = max(0, window - (len(asked) - tokens))
    total: Tensor | None = None
    last: Tensor | None = None
    cache = new_cache(lm)
    with lm.lock:
        for start, stop, wanted in _blocks(len(asked), window, "mass" in needs):
            if not wanted:
                _forward(lm, asked[start:stop], cache, start, seen=start)
                continue
            with _captured(lm) as seen:
                _forward(lm, asked[start:stop], cache, start, seen=start, weights=True)
            held = extract(cache, stop)
            sums = torch.stack(
                [
                    _over_context(_grouped(w, held).sum(1), held, i, tokens)
                    for i, w in enumerate(seen.weights(len(held.layers)))
                ]
            )
            total = sums if total is None else total + sums
            if stop == len(asked):
                last = sums / (stop - start)
                last[..., tokens - inside :] = 0
    return Evidence(
        window=last if "window" in needs else None,
        asked_window=last if "asked_window" in needs else None,
        mass=total if "mass" in needs else None,
        window_tokens=inside,
        asked_window_tokens=inside,
    )


def read_press(lm: LanguageModel, ids: Sequence[int], name: str, dropped: float = 0.0) -> Evidence:
    """The scores that the class `name` of the kvpress package gives every position.

    Its `score` is called as its own hook would call it: during one prefill, with the attention
    layer, its inputs, keys and values, and with the share of positions that will be `dropped` as
    its compression_ratio. Attention weights reach it where the model runs eager attention.
    Raises ConfigError where kvpress or the class is missing, or the class scores nothing.
    """
    press = _make_press(name)
    press.compression_ratio = dropped
    cache, scores = new_cache(lm), dict[int, Tensor]()

    def hook(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        if layer.is_sliding:
            return
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        try:
            found = press.score(module, named["hidden_states"], layer.keys, layer.values, weights, named)
        except Exception as error:  # foreign code: it may raise anything
            raise ConfigError(f"kvpress {name} cannot score layer {module.layer_idx}: {error!r}") from error
        if tuple(found.shape) != tuple(layer.keys.shape[:3]):
            raise ConfigError(
                f"kvpress {name}: expected scores {tuple(layer.keys.shape[:3])}, got {tuple(found.shape)}"
            )
        scores[module.layer_idx] = found[0].float().cpu()

    with lm.lock:
        if hasattr(press, "post_init_from_model"):
            press.post_init_from_model(lm.model)
        layers = attention_layers(lm.model)
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in layers]
        # Presses find the rotary embedding at each layer, where kvpress puts it.
        rotary = getattr(lm.model.model, "rotary_emb", None) if hasattr(lm.model, "model") else None
        lent = [m for m in layers if rotary is not None and not hasattr(m, "rotary_emb")]
        for layer in lent:
            object.__setattr__(layer, "rotary_emb", rotary)  # not a submodule: the model stays as it is
        try:
            _forward(lm, ids, cache, 0, seen=0)
        finally:
            for layer in lent:
                object.__delattr__(layer, "rotary_emb")
            for handle in handles:
                handle.remove()
    heads = extract(cache, len(ids)).layers[0].keys.shape[0]
    whole = torch.zeros(heads, len(ids))
    return Evidence(press=torch.stack([scores.get(i, whole) for i in range(len(cache.layers))]))


def _make_press(name: str) -> Any:
    """A kvpress ScorerPress with its defaults. Imported only here: importing it patches attention."""
    try:
        package = importlib.import_module("kvpress")
    except ImportError as error:
        raise ConfigError(
            f"press:{name} needs the package kvpress, which cannot be imported: {error}"
        ) from error
    kind = getattr(package, name, None)
    if kind is None or not callable(getattr(kind, "score", None)):
        raise ConfigError(f"kvpress has no class {name} with a score method")
    try:
        return kind()
    except Exception as error:  # foreign code: presses that need arguments say so in many ways
        raise ConfigError(f"kvpress {name} cannot be made without arguments: {error!r}") from error


def attention_layers(model: Any) -> list[Any]:
    """The attention modules of a transformers model, in the order of its layers."""
    found = (m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx"))
    return sorted(found, key=lambda module: module.layer_idx)


def new_cache(lm: LanguageModel) -> Any:
    return DynamicCache(config=lm.model.config)


def _blocks(tokens: int, window: int, all_blocks: bool) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, captured): the last block is the window; the others only where asked."""
    first = tokens - window
    step = MASS_BLOCK if all_blocks else max(1, first)
    for start in range(0, first, step):
        yield start, min(start + step, first), all_blocks
    yield first, tokens, True


def _forward(
    lm: LanguageModel,
    ids: Sequence[int],
    cache: Any,
    first: int,
    *,
    seen: int,
    positions: Tensor | None = None,
    weights: bool = False,
) -> Any:
    """One forward pass that fills `cache`. `seen`: logical length before it. `weights`: see `forward`."""
    places = torch.arange(first, first + len(ids)) if positions is None else positions
    visible = getattr(cache, "visible", None)
    mask = torch.ones(seen + len(ids), dtype=torch.long)
    if visible is not None:
        mask[: len(visible)] = visible
    with lm.lock:
        forward(lm.model, ids, cache, places, mask, last_only=True, weights=weights)
    return cache


class _Seen:
    """Attention weights `[Hq, Q, S]` of each layer, taken as the layers run."""

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor] = {}

    def weights(self, layers: int) -> list[Tensor]:
        if sorted(self.by_layer) != list(range(layers)):
            raise UnsupportedCacheError(
                f"attention weights of layers {sorted(self.by_layer)} were seen, expected all {layers}"
            )
        return [self.by_layer[index] for index in range(layers)]


@contextmanager
def _captured(lm: LanguageModel) -> Iterator[_Seen]:
    """Run the model with eager attention and keep each layer's weights. Hold `lm.lock`."""
    seen = _Seen()

    def hook(module: Any, arguments: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise UnsupportedCacheError(f"{type(module).__name__} does not return its attention weights")
        seen.by_layer[module.layer_idx] = output[1][0].float().cpu()

    try:
        lm.model.set_attn_implementation("eager")
    except ValueError as error:
        raise ModelError(f"{lm.name}: eager attention is not available: {error}") from error
    handles = [module.register_forward_hook(hook) for module in attention_layers(lm.model)]
    try:
        yield seen
    finally:
        lm.model.set_attn_implementation(lm.attention)
        for handle in handles:
            handle.remove()


def _grouped(weights: Tensor, cache: KVCache) -> Tensor:
    """`[Hq, Q, S]` → `[Hkv, Q, S]`: mean over the query heads of a group."""
    heads = cache.layers[0].keys.shape[0]
    return weights.unflatten(0, (heads, -1)).mean(1)


def _over_context(scores: Tensor, cache: KVCache, layer: int, tokens: int | None = None) -> Tensor:
    """`[Hkv, S]` over cached and new keys → `[Hkv, T]` over context positions.

    Layers with a sliding window count as zeros: they travel whole and need no vote.
    """
    out = torch.zeros(scores.shape[0], tokens or cache.tokens)
    if not cache.layers[layer].sliding:
        count = min(out.shape[1], cache.tokens, scores.shape[1])
        out[:, :count] = scores[:, :count]
    return out
