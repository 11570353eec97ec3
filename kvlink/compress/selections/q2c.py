"""Question-to-context attention. Sees the context and the question.

Does not know: models, the wire. Place on the path: between prefill and encode.
"""

from __future__ import annotations

from torch import Tensor

from kvlink.cache import Evidence
from kvlink.compress.selections.base import needed, normalise, pool
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores `[L, Hkv, T]`."""
    question = needed(evidence.question, "question")
    return pool(normalise(question, selection.sinks), selection.pool)
