"""The scores of a kvpress ScorerPress as they are. Sees the context only.

Does not know: models, the wire. Place on the path: between prefill and encode.
"""

from __future__ import annotations

from torch import Tensor

from kvlink.cache import Evidence
from kvlink.compress.selections.base import needed
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores `[L, Hkv, T]`."""
    return needed(evidence.press, "press")
