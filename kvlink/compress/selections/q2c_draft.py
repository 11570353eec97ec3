"""q2c, with the tokens of the sender's own short answer voting beside the question's.

Sees the context, the question and the draft. Each token has one vote.

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
    question, draft = needed(evidence.question, "question"), needed(evidence.draft, "draft")
    asked, drafted = evidence.question_tokens, evidence.draft_tokens
    votes = (question * asked + draft * drafted) / max(1, asked + drafted)
    return pool(normalise(votes, selection.sinks), selection.pool)
