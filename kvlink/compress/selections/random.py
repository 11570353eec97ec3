"""Uniform, from `seed`: the floor that any method has to beat. Sees nothing.

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
    generator = torch.Generator().manual_seed(selection.seed)
    if selection.scope == "shared":
        one = torch.rand(shape.tokens, generator=generator)
        return one.expand(shape.layers, shape.kv_heads, -1)
    return torch.rand((shape.layers, shape.kv_heads, shape.tokens), generator=generator)
