"""What segments a transfer has: which positions of a context, by which codec, in what order.

    nothing is there     the selected positions · the others as a background
    within a deadline    the selected positions in tiers, the most needed first · the others as a background
    a base is there      what is new · what is there too coarsely, finer · a background where there was none

`Delivered` is what a receiver holds after a transfer, as far as its sender knows it: enough to plan what is
missing for another question, or for a context that has grown.

Does not know: models, frames, how a position was scored. Place on the path: between select and encode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink.cache import KVCache
from kvlink.codecs import Codec
from kvlink.compress.codec import SegmentPlan
from kvlink.payload import Base
from kvlink.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a receiver holds. `digest`: 16 bytes that name it. `tokens` T: what it stands for.

    `fine`: positions that came by `codec`, `[K]` or `[L, Hkv, K]` int64; None: all. `background`: the codec by
    which all others are there too; None: they are not.
    """

    digest: bytes
    tokens: int
    codec: Codec
    fine: Tensor | None
    background: Codec | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.fine is None else self.fine.nbytes

    @property
    def base(self) -> Base:
        """How a manifest names it."""
        whole = self.fine is None or self.background is not None
        kept = self.tokens if whole or self.fine is None else self.fine.shape[-1]
        return Base(self.digest, self.tokens, kept)

    def serves(self, recipe: Recipe) -> bool:
        """Whether a transfer by `recipe` can add to it: what is fine there is as fine as was asked for."""
        same = recipe.codec == self.codec and recipe.selection.when == "after"
        return same and (self.background is None or recipe.background in (None, self.background))


def plan(
    cache: KVCache, recipe: Recipe, positions: Tensor | None, tiers: Sequence[Tensor] = ()
) -> list[SegmentPlan]:
    """The segments of a whole transfer. `positions`: what the selection chose, None for all. `tiers`: the same
    positions in their order of importance, a segment each."""
    plans, present = list[SegmentPlan](), 0
    for tier in tiers:
        present += tier.shape[-1]
        rest = present == cache.tokens
        plans.append(SegmentPlan.of(cache, recipe.codec, tier, rest=rest, first=not plans))
    if not tiers:
        plans = [SegmentPlan.of(cache, recipe.codec, positions)]
    if positions is not None and recipe.background is not None and positions.shape[-1] < cache.tokens:
        plans.append(SegmentPlan.of(cache, recipe.background, cache.others(positions), rest=True))
    return plans


def plan_missing(
    cache: KVCache, recipe: Recipe, wanted: Tensor | None, scores: Tensor | None, base: Delivered
) -> list[SegmentPlan]:
    """The segments of a transfer that adds to `base`; none where nothing is missing.

    `wanted`: positions that the selection chose, None for all; `scores` `[S, T]`: how much each is needed. Tokens
    behind the base's are always wanted. Every set gets equally many positions: as many as are missing in the
    mean, the most needed first.
    """
    longer = base.tokens < cache.tokens
    chosen = _missing(cache, wanted, scores, base)
    if base.background is None:
        plans = []
        if chosen is not None:
            rest = base.base.kept + chosen.shape[-1] == cache.tokens
            plans.append(SegmentPlan.of(cache, recipe.codec, chosen, first=longer, rest=rest))
        fine = base.fine if chosen is None else _union(cache, base.fine, base.tokens, chosen)
        if recipe.background is not None and fine is not None:
            plans.append(SegmentPlan.of(cache, recipe.background, cache.others(fine), rest=True))
        return plans
    plans = []
    if longer:
        new = torch.arange(base.tokens, cache.tokens)
        plans.append(SegmentPlan.of(cache, recipe.codec, new, first=True, rest=True))
        chosen = _below(cache, chosen, base.tokens)
    if chosen is not None:
        rest = chosen.shape[-1] == cache.tokens
        plans.append(SegmentPlan.of(cache, recipe.codec, chosen, "refinement", rest=rest))
    return plans


def delivered(
    plans: Sequence[SegmentPlan], recipe: Recipe, digest: bytes, before: Delivered | None = None
) -> Delivered:
    """What a receiver holds after `plans`, on top of what it held `before`."""
    cache = plans[0].cache
    fine, tokens = (before.fine, before.tokens) if before else (None, 0)
    background = before.background if before else None
    for one in plans:
        if one.header.codec == recipe.codec:
            fine, tokens = _union(cache, fine, tokens, one.positions), cache.tokens
        else:
            background = one.header.codec
    return Delivered(digest, cache.tokens, recipe.codec, fine, background)


def _mask(cache: KVCache, positions: Tensor | None, tokens: int) -> Tensor:
    """`[L, Hkv, T]` or `[1, 1, T]` bool: `positions`, None for the first `tokens`."""
    if positions is None:
        return (torch.arange(cache.tokens) < tokens)[None, None]
    sets = positions if positions.ndim == 3 else positions[None, None]
    return torch.zeros(*sets.shape[:2], cache.tokens, dtype=torch.bool).scatter_(2, sets, True)


def _positions(mask: Tensor) -> Tensor:
    """`[K]` or `[L, Hkv, K]` of a mask with equally many in each set."""
    found = mask.nonzero()[:, 2].reshape(*mask.shape[:2], -1)
    return found[0, 0] if found.shape[:2] == (1, 1) else found


def _union(cache: KVCache, fine: Tensor | None, fine_tokens: int, more: Tensor | None) -> Tensor | None:
    """`fine`, None for the first `fine_tokens`, and `more`, None for all. None where they are all of the cache's."""
    joined = _mask(cache, fine, fine_tokens) | _mask(cache, more, cache.tokens)
    return None if bool(joined.all()) else _positions(joined)


def _missing(cache: KVCache, wanted: Tensor | None, scores: Tensor | None, base: Delivered) -> Tensor | None:
    have = _mask(cache, base.fine, base.tokens)
    lacking = _mask(cache, wanted, cache.tokens) & ~have
    lacking[..., base.tokens :] = True
    full = [index for index, layer in enumerate(cache.layers) if not layer.sliding]
    counted = lacking[full] if len(lacking) > 1 else lacking
    counts = counted.sum(-1)
    if not int(counts.sum()):
        return None
    if bool((counts == counts.flatten()[0]).all()) and (len(lacking) == 1 or len(full) == len(lacking)):
        return _positions(lacking)
    many = int(counts.float().mean().ceil())
    need = torch.zeros(lacking.shape)
    if scores is not None:
        found = (
            scores.float().reshape(1, 1, -1) if len(scores) == 1 else scores.float().reshape(lacking.shape)
        )
        need = (
            (found / found.amax(-1, keepdim=True).clamp(min=1e-20)).clamp(0, 1).expand(lacking.shape).clone()
        )
    need += lacking
    need[..., base.tokens :] += 1
    best = need.masked_fill(have.expand(need.shape), -1.0)
    return best.sort(dim=-1, descending=True, stable=True).indices[..., :many].sort(-1).values


def _below(cache: KVCache, chosen: Tensor | None, tokens: int) -> Tensor | None:
    """Those of `chosen` below `tokens`; every set has the same others."""
    if chosen is None:
        return None
    mask = _mask(cache, chosen, cache.tokens)
    mask[..., tokens:] = False
    return _positions(mask) if bool(mask.any()) else None
