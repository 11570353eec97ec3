"""A cache to the segments of a recipe and back, without a model, a session or frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvlink.agent.builder import restored
from kvlink.cache import KVCache
from kvlink.compress.codec import SegmentPlan, encode
from kvlink.compress.codecs import CodecContext
from kvlink.payload import CacheShape, Segment
from kvlink.recipe import Recipe


def encoded(
    cache: KVCache, recipe: Recipe, context: CodecContext | None = None, kept: torch.Tensor | None = None
) -> list[Segment]:
    """`cache` as it is; with `kept` `[K]` these positions, and where there is a background the others too."""
    plans = [SegmentPlan.of(cache, recipe.codec, kept)]
    if kept is not None and recipe.background is not None:
        plans.append(SegmentPlan.of(cache, recipe.background, cache.others(kept), rest=True))
    return [encode(plan, recipe.coder, context) for plan in plans]


def decoded(
    segments: Sequence[Segment],
    shape: CacheShape,
    context: CodecContext | None = None,
    base: KVCache | None = None,
) -> KVCache:
    return restored(segments, shape, lambda _: context or CodecContext(), base)


def there_and_back(
    cache: KVCache, recipe: Recipe, context: CodecContext | None = None, kept: torch.Tensor | None = None
) -> KVCache:
    return decoded(encoded(cache, recipe, context, kept), cache.shape, context)
