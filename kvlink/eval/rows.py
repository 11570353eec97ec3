"""Outcomes of questions, and the rows of tables that sum them up: the same for demo and eval.

Does not know: how an outcome came about. Place on the path: after it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvlink.compress.select import sees
from kvlink.eval.score import interval
from kvlink.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question by one recipe; the figures of one line of a run's record.

    `f1_full`, `own_answer`: the sender's own, from its full cache. `agrees`: both answers are equal
    letter for letter. `kl`: KL(sender ‖ receiver) of the next-token distributions, in nats, mean over
    the tokens of the sender's own answer; `kl_most` the largest. None where it was not measured.
    `ttft_s`: from the request to the first token, seconds. `more`: figures of one table only.
    """

    answer: str
    own_answer: str
    f1: float
    f1_full: float
    em: float
    agrees: bool
    wire_bytes: int
    bits_per_element: float
    ttft_s: float
    context_tokens: int
    kept_tokens: int
    kl: float | None = None
    kl_most: float | None = None
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table. Means over `n` questions, except `ttft_s`: the median.

    `f1_low`, `f1_high`: 95 % bootstrap interval of F1. `ci_low`, `ci_high`: the same, paired, of F1
    minus the full cache's F1 on the same questions. `share_of_full`: F1 ÷ full F1. `agreement`:
    share of answers equal to the sender's own, letter for letter. `kl_mean`: nats, see `Outcome`.
    `method`: pruned after the prefill, or left out during it. `sees`: what the selection looked at.
    Where a figure has no meaning for a row it is None.
    """

    table: str = ""
    model: str = ""
    data: str = ""
    mode: str = ""
    codec: str = ""
    recipe: str = ""
    recipe_full: str = ""
    selection: str | None = None
    scope: str | None = None
    retention: float | None = None
    method: str | None = None
    question_shift: str | None = None
    sees: str | None = None
    n: int = 0
    f1: float | None = None
    f1_low: float | None = None
    f1_high: float | None = None
    f1_full: float | None = None
    share_of_full: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    em: float | None = None
    agreement: float | None = None
    kl_mean: float | None = None
    kl_most: float | None = None
    wire_bytes: float | None = None
    bits_per_element: float | None = None
    ttft_s: float | None = None
    context_tokens: float | None = None
    kept_tokens: float | None = None
    seed: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Flat: the figures of one table stand beside the others."""
        data = asdict(self)
        more = data.pop("more")
        return {**data, **more}


def summarise(recipe: str, found: Sequence[Outcome], *, shift: str = "same", **known: Any) -> Row:
    """The row of one recipe over its questions, in their order. `known`: fields that are given."""
    mean = statistics.fmean
    parsed = Recipe.parse(recipe)
    low, high = interval([o.f1 for o in found])
    ci_low, ci_high = interval([o.f1 - o.f1_full for o in found])
    f1, full = mean(o.f1 for o in found), mean(o.f1_full for o in found)
    kl = [o.kl for o in found if o.kl is not None]
    more = {name: mean(o.more[name] for o in found) for name in found[0].more}
    selection, is_kv = parsed.selection, parsed.mode == "kv"
    amount = selection.amount
    return Row(
        mode=parsed.mode,
        codec="text" if parsed.mode == "text" else parsed.codec.family,
        recipe=recipe,
        recipe_full=str(parsed),
        selection=selection.name if is_kv else None,
        scope=selection.scope if is_kv else None,
        retention=amount.value if is_kv and amount.unit == "ratio" else None,
        method=selection.when if is_kv else None,
        question_shift=shift,
        sees=sees(selection.method) if is_kv else None,
        n=len(found),
        f1=f1,
        f1_low=low,
        f1_high=high,
        f1_full=full,
        share_of_full=f1 / full if full else None,
        ci_low=ci_low,
        ci_high=ci_high,
        em=mean(o.em for o in found),
        agreement=mean(o.agrees for o in found),
        kl_mean=mean(kl) if kl else None,
        kl_most=max(o.kl_most or 0.0 for o in found) if kl else None,
        wire_bytes=mean(o.wire_bytes for o in found),
        bits_per_element=mean(o.bits_per_element for o in found),
        ttft_s=statistics.median(o.ttft_s for o in found),
        context_tokens=mean(o.context_tokens for o in found),
        kept_tokens=mean(o.kept_tokens for o in found),
        more={**more, **known.pop("more", {})},
        **known,
    )
