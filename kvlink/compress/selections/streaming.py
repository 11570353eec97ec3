"""Sinks and the most recent tokens. Sees nothing. Source: arXiv 2309.17453.

Does not know: models, the wire. Place on the path: between prefill and encode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlink.cache import Evidence
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores `[L, Hkv, T]`."""
    ramp = torch.arange(1, shape.tokens + 1, dtype=torch.float32) / shape.tokens
    return ramp.expand(shape.layers, shape.kv_heads, -1)
