"""Between a `KVCache` and the model's own cache class.

A `DynamicCache` made by `view` shares the tensors of the `KVCache`: `update` builds new tensors,
so any number of generations can work on one context, each on its own view. A test guards this.

Does not know: prompts, codecs. Place on the path: after prefill, before evidence and generation.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.errors import ContextError, IdentityError, UnsupportedCacheError
from kvlink.model.language import LanguageModel
from kvlink.payload import CacheShape


def extract(cache: Any, tokens: int, positions: Any = None) -> KVCache:
    """The `KVCache` of a filled `DynamicCache` of one sequence.

    `positions` `[K]` where the cache was filled from kept tokens only. Shares the tensors.
    Raises UnsupportedCacheError for any other cache or layer class, by name.
    """
    if type(cache) is not DynamicCache:
        raise UnsupportedCacheError(f"expected a DynamicCache, the model keeps a {type(cache).__name__}")
    layers = []
    held_layers: list[Any] = cache.layers
    for index, layer in enumerate(held_layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise UnsupportedCacheError(
                f"layer {index}: cache layer {type(layer).__name__} is not understood"
            )
        batch, heads, held, _ = layer.keys.shape
        if batch != 1:
            raise UnsupportedCacheError(f"expected the cache of one sequence, found a batch of {batch}")
        sliding = type(layer) is DynamicSlidingWindowLayer
        if positions is None or sliding:
            places = full_positions(heads, held, tokens - held)
        else:
            places = positions.expand(heads, -1)
        layers.append(LayerCache(layer.keys[0], layer.values[0], places, sliding))
    shapes = {(x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) for x in layers}
    if len(shapes) != 1:
        raise UnsupportedCacheError(f"its layers differ in heads or head size: {sorted(shapes)}")
    if any(d != v for _, d, v in shapes):
        ((_, keys_size, values_size),) = shapes
        raise UnsupportedCacheError(
            f"its keys have {keys_size} numbers and its values {values_size}, as in latent attention"
        )
    return KVCache(tuple(layers), tokens)


def cache_shape(lm: LanguageModel, tokens: int) -> CacheShape:
    """The shape that this model's own cache of `tokens` tokens would have."""
    layers: list[Any] = DynamicCache(config=lm.model.config).layers
    whole = tuple((i, min(tokens, x.sliding_window - 1)) for i, x in enumerate(layers) if x.is_sliding)
    return CacheShape(len(layers), lm.traits.kv_heads, tokens, lm.traits.head_size, lm.dtype, whole)


def view(lm: LanguageModel, cache: KVCache, out: DynamicCache | None = None) -> DynamicCache:
    """A cache for one generation that shares the tensors of `cache`. `out`: an empty one to fill.

    Where the model counts keys, a cache of fewer positions comes at its full length, with its own `visible`.
    Raises IdentityError where the cache does not fit the model's layers.
    """
    out = DynamicCache(config=lm.model.config) if out is None else out
    if lm.traits.padded and any(not x.sliding and x.keys.shape[1] < cache.tokens for x in cache.layers):
        cache, out.visible = _padded(cache)  # type: ignore[attr-defined]
    if out.layers and len(out.layers) != len(cache.layers):
        raise IdentityError(f"the model has {len(out.layers)} layers, the cache {len(cache.layers)}")
    out.layers = out.layers or [DynamicLayer() for _ in cache.layers]
    targets: list[Any] = out.layers
    for index, (target, layer) in enumerate(zip(targets, cache.layers, strict=True)):
        if isinstance(target, DynamicSlidingWindowLayer) is not layer.sliding:
            raise IdentityError(f"layer {index}: sliding window at one end only")
        keys, values = layer.keys[None].to(lm.model.device), layer.values[None].to(lm.model.device)
        target.lazy_initialization(keys, values)
        target.keys, target.values = keys, values
        if layer.sliding:
            target.cumulative_length = cache.tokens
    return out


def _padded(cache: KVCache) -> tuple[KVCache, Tensor]:
    """The cache at its full length, zeros where nothing is held, and what is held `[T]` bool."""
    held = cache.layers[0].positions[0]
    layers = []
    for layer in cache.layers:
        if layer.sliding or not bool((layer.positions == held.to(layer.positions.device)).all()):
            raise UnsupportedCacheError("this model needs the same positions in every layer and head")
        sides = []
        for tensor in (layer.keys, layer.values):
            whole = tensor.new_zeros(tensor.shape[0], cache.tokens, tensor.shape[2])
            whole[:, held.to(tensor.device)] = tensor
            sides.append(whole)
        layers.append(LayerCache(sides[0], sides[1], full_positions(len(layer.keys), cache.tokens)))
    visible = torch.zeros(cache.tokens, dtype=torch.bool)
    visible[held.cpu()] = True
    return KVCache(tuple(layers), cache.tokens), visible


def join(*caches: KVCache) -> NoReturn:
    """Refused: keys of two contexts that were read apart never saw each other."""
    raise ContextError(
        f"joining the caches of {len(caches)} contexts is not supported: their tokens never attended to each "
        "other, and both start at position 0; read the texts as one context, or ask each on its own"
    )
