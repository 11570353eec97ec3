"""Which positions of a context the receiver needs: the methods side by side.

A method's module in `compress.selections` turns `Evidence` into scores `[L, Hkv, T]`; `choose_positions` turns
scores into positions by the same rules for all of them.

Does not know: models, quantizers, the wire. Place on the path: between prefill and quantize.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvlink.cache import Evidence
from kvlink.compress.selections import scorer
from kvlink.compress.selections.base import kept_count
from kvlink.payload import CacheShape
from kvlink.selection import METHODS, Selection

TIERS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the kept positions that are there after each tier, where positions come in order of importance."""

SEES: dict[str, str] = {
    "question": "context and question",
    "draft": "the sender's draft",
    "window": "context",
    "asked_window": "context and question",
    "mass": "context",
    "press": "context",
}
"""What a method has seen, by the evidence that it needs; for the tables."""


def needs(method: str) -> frozenset[str]:
    """The evidence that a method sees, by the field names of `Evidence`; it is given no other."""
    return METHODS[method]


def sees(method: str) -> str:
    """What a method looks at before it chooses, in words."""
    found = [SEES[need] for need in sorted(needs(method), reverse=True)]
    return ", ".join(found) if found else "nothing"


def mass_count(scores: Tensor, share: float, always: Tensor) -> int:
    """Smallest K that holds `share` of the score mass in every set of `scores` `[S, T]`.

    `always` `[T]` marks the positions that are kept anyway. With several sets the largest K that
    any of them needs, so that counts stay equal.
    """
    ordered = scores.clamp(min=0).masked_fill(always, torch.inf).sort(-1, descending=True).values
    forced = int(always.sum())
    open_mass = ordered[:, forced:].double()
    total = open_mass.sum(-1, keepdim=True)
    held = (open_mass.cumsum(-1) < share * total * (1 - 1e-6)).sum(-1)
    needed = torch.where(total[:, 0] > 0, held + 1, torch.zeros_like(held))
    return min(scores.shape[1], forced + int(needed.max()))


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores of every position: `[S, T]` float32, S = 1 (shared) or L·Hkv (head).

    Raises RecipeError where the evidence that the method needs was not captured.
    """
    scores = scorer(selection.method)(evidence.only(needs(selection.method)), selection, shape).float()
    if selection.scope == "shared":
        full = [i for i in range(shape.layers) if i not in dict(shape.whole_layers)]
        return scores[full].sum((0, 1))[None]
    return scores.reshape(-1, shape.tokens)


def choose_positions(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """The kept positions: `[K]` (shared) or `[L, Hkv, K]` (head), int64, ascending.

    The first `sinks` and last `recent` positions are always in; ties go to the lower position.
    """
    tokens, always = shape.tokens, _always(selection, shape.tokens)
    if selection.method == "all":
        return torch.arange(tokens)
    scores = score(evidence, selection, shape)
    if selection.amount.unit == "mass":
        count = mass_count(scores, selection.amount.value, always)
    else:
        count = kept_count(selection, tokens)
    ranked = scores.masked_fill(always, torch.inf)
    # A stable sort keeps the lower position first among equals.
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    return best[0] if selection.scope == "shared" else best.reshape(shape.layers, shape.kv_heads, count)


def _always(selection: Selection, tokens: int) -> Tensor:
    """`[T]` bool: sinks and recent tokens, which every choice has."""
    always = torch.zeros(tokens, dtype=torch.bool)
    always[: selection.sinks] = True
    always[max(0, tokens - selection.recent) :] = True
    return always


def in_tiers(positions: Tensor, evidence: Evidence, order: Selection, shape: CacheShape) -> list[Tensor]:
    """`positions` `[K]` or `[L, Hkv, K]` in tiers, the most needed first, each ascending; together they are all.

    After tier i a share TIERS[i] of them is there, the sinks and recent tokens from the first one on. Every tier has
    equally many positions in each set. `order`: the selection whose scores say what is needed.
    """
    count, always = positions.shape[-1], _always(order, shape.tokens)
    scores = score(evidence, order, shape).masked_fill(always, torch.inf)
    sets = positions.reshape(-1, count)
    if len(scores) != len(sets):  # one set for all: by what all layers and heads need together
        scores = scores.sum(0, keepdim=True) if len(sets) == 1 else scores.expand(len(sets), -1)
    ranked = sets.gather(1, scores.gather(1, sets).sort(dim=1, descending=True, stable=True).indices)
    forced = int(always[sets].sum(1).max())
    ends = sorted({min(count, max(forced, 1, math.ceil(share * count))) for share in TIERS})
    begins = [0, *ends[:-1]]
    return [
        ranked[:, begin:end].sort(dim=1).values.reshape(*positions.shape[:-1], end - begin)
        for begin, end in zip(begins, ends, strict=True)
    ]
