"""Between a `KVCache` and the model's own cache class.

A `DynamicCache` made by `view` shares the tensors of the `KVCache`: `update` builds new tensors,
so any number of generations can work on one context, each on its own view. A test guards this.

Does not know: prompts, codecs. Place on the path: after prefill, before evidence and generation.
"""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.errors import ContextError, IdentityError, UnsupportedCacheError
from kvlink.model.loading import LanguageModel
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
    if len(shapes) != 1 or any(d != v for _, d, v in shapes):
        raise UnsupportedCacheError(f"layers differ in heads or head size: {sorted(shapes)}")
    return KVCache(tuple(layers), tokens)


def cache_shape(lm: LanguageModel, tokens: int) -> CacheShape:
    """The shape that this model's own cache of `tokens` tokens would have."""
    config = lm.model.config.get_text_config(decoder=True)
    layers: list[Any] = DynamicCache(config=lm.model.config).layers
    whole = tuple((i, min(tokens, x.sliding_window - 1)) for i, x in enumerate(layers) if x.is_sliding)
    return CacheShape(
        layers=len(layers),
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        tokens=tokens,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=lm.dtype,
        whole_layers=whole,
    )


def view(lm: LanguageModel, cache: KVCache) -> DynamicCache:
    """A cache for one generation that shares the tensors of `cache`.

    Raises IdentityError where the cache does not fit the model's layers.
    """
    out = DynamicCache(config=lm.model.config)
    if len(out.layers) != len(cache.layers):
        raise IdentityError(f"the model has {len(out.layers)} layers, the cache {len(cache.layers)}")
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


def join(*caches: KVCache) -> NoReturn:
    """Refused: keys of two contexts that were read apart never saw each other."""
    raise ContextError(
        f"joining the caches of {len(caches)} contexts is not supported: their tokens never attended to each "
        "other, and both start at position 0; read the texts as one context, or ask each on its own"
    )
