"""Attention of the last W context tokens, pooled; the window itself is kept.

Sees the context only, so one choice serves every question. Source: arXiv 2404.14469.
Differs: avg-pool (the paper's text says pooling, its code offers both). The window is a
quarter of a context that is shorter than four windows, and at most half of what is kept.

Does not know: models, the wire. Place on the path: between prefill and encode.
"""

from __future__ import annotations

from torch import Tensor

from kvlink.cache import Evidence
from kvlink.compress.selections.base import needed, observed
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores `[L, Hkv, T]`."""
    window = needed(evidence.window, "window")
    return observed(window, evidence.window_tokens, selection, shape)
