"""snapkv as its paper runs it: the window is the end of the whole prompt, the question included.

Sees the context and the question. Source: arXiv 2404.14469.

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
    window = needed(evidence.asked_window, "asked_window")
    return observed(window, evidence.asked_window_tokens, selection, shape)
