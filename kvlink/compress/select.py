"""Which positions of a context the receiver needs: the methods side by side.

Each method turns `Evidence` into scores `[L, Hkv, T]`; `choose_positions` turns scores into
positions by the same rules for all of them. What a method sees is written at its name.

Does not know: models, quantizers, the wire. Place on the path: between prefill and quantize.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvlink.cache import Evidence
from kvlink.errors import RecipeError
from kvlink.payload import CacheShape
from kvlink.recipe import Selection

TIERS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the kept positions that are there after each tier, where positions come in order of importance."""

_NEEDS: dict[str, frozenset[str]] = {
    "all": frozenset(),
    "q2c": frozenset({"question"}),
    "q2c+draft": frozenset({"question", "draft"}),
    "snapkv": frozenset({"window"}),
    "snapkv+question": frozenset({"asked_window"}),
    "h2o": frozenset({"mass"}),
    "streaming": frozenset(),
    "random": frozenset(),
    "press": frozenset({"press"}),
}

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
    return _NEEDS[method]


def sees(method: str) -> str:
    """What a method looks at before it chooses, in words."""
    found = [SEES[need] for need in sorted(needs(method), reverse=True)]
    return ", ".join(found) if found else "nothing"


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


def _pool(scores: Tensor, width: int) -> Tensor:
    """Average over `width` neighbouring tokens; at the ends over those that exist."""
    if width == 1:
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    pooled = torch.nn.functional.avg_pool1d(
        flat, width, stride=1, padding=width // 2, count_include_pad=False
    )
    return pooled.reshape(scores.shape)


def _normalise(scores: Tensor, sinks: int) -> Tensor:
    """Every layer and head votes with mass 1 over the positions that are not sinks."""
    scores = scores.clone()
    scores[..., :sinks] = 0
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def _q2c(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Question-to-context attention. Sees the context and the question."""
    question = _needed(evidence.question, "question")
    return _pool(_normalise(question, selection.sinks), selection.pool)


def _q2c_draft(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """q2c, with the tokens of the sender's own short answer voting beside the question's.

    Sees the context, the question and the draft. Each token has one vote.
    """
    question, draft = _needed(evidence.question, "question"), _needed(evidence.draft, "draft")
    asked, drafted = evidence.question_tokens, evidence.draft_tokens
    votes = (question * asked + draft * drafted) / max(1, asked + drafted)
    return _pool(_normalise(votes, selection.sinks), selection.pool)


def _snapkv(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Attention of the last W context tokens, pooled; the window itself is kept.

    Sees the context only, so one choice serves every question. Source: arXiv 2404.14469.
    Differs: avg-pool (the paper's text says pooling, its code offers both). The window is a
    quarter of a context that is shorter than four windows, and at most half of what is kept.
    """
    window = _needed(evidence.window, "window")
    return _observed(window, evidence.window_tokens, selection, shape)


def _snapkv_question(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """snapkv as its paper runs it: the window is the end of the whole prompt, the question included.

    Sees the context and the question. Source: arXiv 2404.14469.
    """
    window = _needed(evidence.asked_window, "asked_window")
    return _observed(window, evidence.asked_window_tokens, selection, shape)


def _observed(window: Tensor, kept: int, selection: Selection, shape: CacheShape) -> Tensor:
    """Pooled attention of an observation window; its own `kept` context tokens come first."""
    scores = _pool(_normalise(window, selection.sinks), selection.pool)
    if selection.amount.unit in ("ratio", "count"):
        kept = min(kept, kept_count(selection, shape.tokens) // 2)
    if kept:
        scores[..., -kept:] = 2.0  # above any share of a mass of 1
    return scores


def _h2o(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Half heavy hitters by accumulated attention, half recent tokens.

    Sees the context only. Source: arXiv 2306.14048 (its defaults split the budget evenly).
    """
    scores = _needed(evidence.mass, "mass")
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    if selection.amount.unit in ("ratio", "count"):
        recent = kept_count(selection, shape.tokens) // 2
        if recent:
            scores[..., -recent:] = 2.0
    return scores


def _streaming(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Sinks and the most recent tokens. Sees nothing. Source: arXiv 2309.17453."""
    ramp = torch.arange(1, shape.tokens + 1, dtype=torch.float32) / shape.tokens
    return ramp.expand(shape.layers, shape.kv_heads, -1)


def _random(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Uniform, from `seed`: the floor that any method has to beat. Sees nothing."""
    generator = torch.Generator().manual_seed(selection.seed)
    if selection.scope == "shared":
        one = torch.rand(shape.tokens, generator=generator)
        return one.expand(shape.layers, shape.kv_heads, -1)
    return torch.rand((shape.layers, shape.kv_heads, shape.tokens), generator=generator)


def _press(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """The scores of a kvpress ScorerPress as they are. Sees the context only."""
    return _needed(evidence.press, "press")


SCORERS: dict[str, Callable[[Evidence, Selection, CacheShape], Tensor]] = {
    "q2c": _q2c,
    "q2c+draft": _q2c_draft,
    "snapkv": _snapkv,
    "snapkv+question": _snapkv_question,
    "h2o": _h2o,
    "streaming": _streaming,
    "random": _random,
    "press": _press,
}


def score(evidence: Evidence, selection: Selection, shape: CacheShape) -> Tensor:
    """Scores of every position: `[S, T]` float32, S = 1 (shared) or L·Hkv (head).

    Raises RecipeError where the evidence that the method needs was not captured.
    """
    scores = SCORERS[selection.method](evidence.only(needs(selection.method)), selection, shape).float()
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


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise RecipeError(f"this selection needs the model's {name} evidence, which was not captured")
    return tensor
