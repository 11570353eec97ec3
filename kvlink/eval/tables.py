"""The tables: which cases each of them needs. A case is measured once, whatever tables show it.

Source: the study's tables as `docs/evaluation.md` lists them.
Does not know: models, how a case is measured. Place on the path: before it; the plan of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvlink.codecs import INTEGER_BITS
from kvlink.errors import ConfigError
from kvlink.eval.items import SHIFTS, Shift
from kvlink.recipe import Recipe

Kind = Literal["answer", "whole", "added", "masked", "spectrum"]

SELECTIONS = ("q2c", "q2c+draft", "snapkv", "snapkv+question", "h2o", "streaming", "random")
RETENTIONS = (0.75, 0.5, 0.25, 0.1)
DURING = (0.75, 0.5, 0.25)
COMBINED = (0.25, 0.5, 0.75, 1.0)
RANKS = (8, 16, 32, 64)
SPECTRUM_SHARE = 0.05
STEPS = (0.5, 1, 1.41, 2)
RATE_CODECS = (
    "text", "raw", "lossless", "int8", "int4", "int3", "int2", "keys=int4/token values=int4/token",
    *(f"transform={step} basis=own" for step in STEPS),
    *(f"transform={step}" for step in STEPS),
)  # fmt: skip
_RATE_AMOUNTS = (0.5, 0.25, 0.1)
_RATE_STEPS = ("int4", "transform=0.5", "transform=1")
RATE_SELECTED = (
    *(f"q2c+draft@{amount} {codec}" for amount in _RATE_AMOUNTS for codec in _RATE_STEPS),
    "q2c@0.75 int4", "q2c@0.75 transform=1",
)  # fmt: skip
RATE_TIERS = tuple(
    f"q2c+draft@{amount} transform=0.5 rest={rest}" for amount, rest in ((0.25, 2), (0.25, 4), (0.1, 2))
)

CUT_RECIPES = ("transform=1", "q2c+draft@0.25 transform=0.5 rest=2")
CUTS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure on every question.

    `kind`: `answer` sends the cache by the recipe and answers the question of that `shift`; `whole` sends it
    anew for that question, `added` what the first transfer lacks for it; `masked` hides the dropped positions
    in the full cache instead, `zeroed` or not; `spectrum` looks at the singular values of the full cache.
    `cut`: share of the transfer's bytes after which the line is cut, 1 for none; `tiers`: packed within a
    deadline, positions in order of importance.
    """

    recipe: str
    shift: Shift = "same"
    kind: Kind = "answer"
    zeroed: bool = False
    cut: float = 1.0
    tiers: bool = False

    @property
    def order(self) -> str:
        """How its segments come, in words."""
        return "tiers" if self.tiers else "at once"

    @property
    def key(self) -> str:
        """Its name in a run's record."""
        cut = f" | cut at {self.cut:g}, {self.order}" if self.cut < 1 else ""
        return f"{self.kind}{'+zero' if self.zeroed else ''} | {self.recipe} | {self.shift}{cut}"


def _selection(methods: Sequence[str]) -> list[Case]:
    after = [
        Case(f"{method}@{amount} raw{scope}", shift)
        for scope in ("", " scope=head")
        for method in methods
        for amount in RETENTIONS
        for shift in SHIFTS
    ]
    return after + [Case(f"{method}@{amount} raw when=during") for method in methods for amount in DURING]


def _quantization(methods: Sequence[str]) -> list[Case]:
    return [Case("text"), Case("raw"), Case("lossless"), *(Case(f"int{bits}") for bits in INTEGER_BITS)]


def _combined(methods: Sequence[str]) -> list[Case]:
    chosen = ("q2c", "snapkv", "q2c+draft")
    codecs = ("raw", "int8", "int4")
    return [Case(f"{m}@{amount} {codec}") for m in chosen for amount in COMBINED for codec in codecs]


def _low_rank(methods: Sequence[str]) -> list[Case]:
    return [Case(f"svd={rank} {codec}") for rank in RANKS for codec in ("raw", "int8")]


def _transfer(methods: Sequence[str]) -> list[Case]:
    return [Case(recipe) for recipe in ("text", "raw", "lossless", "int8", "int4")]


def _methods(methods: Sequence[str]) -> list[Case]:
    return [
        Case(f"{method}@{amount} raw{when}")
        for method in methods
        for amount in DURING
        for when in ("", " when=during")
    ]


def _masking(methods: Sequence[str]) -> list[Case]:
    out = []
    for amount in DURING:
        recipe = f"q2c@{amount} raw"
        out += [Case(recipe), Case(recipe, kind="masked"), Case(recipe, kind="masked", zeroed=True)]
    return out


def _spectrum(methods: Sequence[str]) -> list[Case]:
    return [Case("raw", kind="spectrum")]


SECOND = (
    "q2c+draft@0.25 transform=0.5 rest=2", "q2c+draft@0.25 transform=0.5", "q2c+draft@0.25 int4",
    "q2c+draft@0.25 int4 scope=head",
)  # fmt: skip


def _second(methods: Sequence[str]) -> list[Case]:
    kinds: tuple[Kind, ...] = ("answer", "whole", "added")
    return [Case(recipe, "unrelated", kind) for recipe in SECOND for kind in kinds]


def _rate(methods: Sequence[str]) -> list[Case]:
    chosen = [*RATE_CODECS, *RATE_SELECTED]
    cases = [Case(recipe, shift) for recipe in (*chosen, *RATE_TIERS) for shift in ("same", "paraphrase")]
    # What selection costs another question, and what tiers give back.
    compared = ("transform=1", "q2c+draft@0.25 transform=0.5", *RATE_TIERS)
    return cases + [Case(recipe, "unrelated") for recipe in compared]


def _cut(methods: Sequence[str]) -> list[Case]:
    return [
        Case(recipe, cut=cut, tiers=tiers)
        for recipe in CUT_RECIPES
        for tiers in (True, False)
        for cut in CUTS
    ]


_MAKERS = {
    "selection": _selection,
    "quantization": _quantization,
    "combined": _combined,
    "low-rank": _low_rank,
    "spectrum": _spectrum,
    "transfer": _transfer,
    "methods": _methods,
    "masking": _masking,
    "rate": _rate,
    "second": _second,
    "cut": _cut,
}
QUESTION_TABLES = tuple(name for name in _MAKERS if name not in ("rate", "second", "cut"))
TABLES = (*_MAKERS, "overhead", "all")


def plan(
    table: str, presses: Sequence[str] = (), recipes: Sequence[str] = (), when: str = ""
) -> dict[str, list[Case]]:
    """The cases of each table that `table` names, in the order of its rows.

    `presses`: further selections. `recipes`: cases of a table of their own, `recipes`. `when`: only
    the cases of that method, where a case selects at all. Raises ConfigError for an unknown table,
    RecipeError for a recipe.
    """
    if table not in TABLES and table != "recipes":
        raise ConfigError(f"unknown table {table!r}; known: {', '.join(TABLES)}, recipes (with --recipe)")
    if when not in ("", "after", "during"):
        raise ConfigError(f"when must be after or during, got {when!r}")
    if table == "recipes" and not recipes:
        raise ConfigError("the table of recipes needs at least one --recipe")
    names = QUESTION_TABLES if table == "all" else [table] if table in _MAKERS else []
    out = {name: _MAKERS[name]((*SELECTIONS, *presses)) for name in names}
    if recipes:
        out["recipes"] = [Case(text, shift) for text in recipes for shift in ("same", "paraphrase")]
    for name, cases in out.items():
        parsed = [(case, Recipe.parse(case.recipe).selection) for case in cases]
        out[name] = [
            case for case, chosen in parsed if not when or chosen.method == "all" or chosen.when == when
        ]
    return out
