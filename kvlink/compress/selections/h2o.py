"""Half heavy hitters by accumulated attention, half recent tokens.

Sees the context only. Source: arXiv 2306.14048 (its defaults split the budget evenly).

Does not know: models, the wire. Place on the path: between prefill and encode.
"""

from __future__ import annotations

from torch import Tensor

from kvlink.cache import Evidence
from kvlink.compress.selections.base import kept_count, needed
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores `[L, Hkv, T]`."""
    scores = needed(evidence.mass, "mass")
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    if selection.amount.unit in ("ratio", "count"):
        recent = kept_count(selection, shape.tokens) // 2
        if recent:
            scores[..., -recent:] = 2.0
    return scores
