"""What scorers share: amounts as counts, votes of mass 1, pooling.

Does not know: any one method. Place on the path: under the scorers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvlink.errors import RecipeError
from kvlink.payload import CacheShape
from kvlink.selection import Selection


def kept_count(selection: Selection, tokens: int) -> int:
    """K for a ratio or count: rounded up, at least the sinks and the recent tokens, at most T.

    The one place where an amount becomes a number of tokens. Amounts that need scores (mass) or
    sizes (bytes) are settled before, by `mass_count` and by the codec.
    """
    amount = selection.amount
    if amount.unit == "ratio":
        wanted = math.ceil(amount.value * tokens - 1e-9)
    elif amount.unit == "count":
        wanted = int(amount.value)
    else:
        raise RecipeError(f"retention by {amount.unit} must be settled before positions are counted")
    return min(tokens, max(wanted, 1, min(tokens, selection.sinks + selection.recent)))


def pool(scores: Tensor, width: int) -> Tensor:
    """Average over `width` neighbouring tokens; at the ends over those that exist."""
    if width == 1:
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    pooled = torch.nn.functional.avg_pool1d(
        flat, width, stride=1, padding=width // 2, count_include_pad=False
    )
    return pooled.reshape(scores.shape)


def normalise(scores: Tensor, sinks: int) -> Tensor:
    """Every layer and head votes with mass 1 over the positions that are not sinks."""
    scores = scores.clone()
    scores[..., :sinks] = 0
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def observed(window: Tensor, kept: int, selection: Selection, shape: CacheShape) -> Tensor:
    """Pooled attention of an observation window; its own `kept` context tokens come first."""
    scores = pool(normalise(window, selection.sinks), selection.pool)
    if selection.amount.unit in ("ratio", "count"):
        kept = min(kept, kept_count(selection, shape.tokens) // 2)
    if kept:
        scores[..., -kept:] = 2.0  # above any share of a mass of 1
    return scores


def needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise RecipeError(f"this selection needs the model's {name} evidence, which was not captured")
    return tensor
