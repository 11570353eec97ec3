"""Selections: which positions of a context travel, and how they are chosen.

`METHODS` is the one table of them: the evidence that each method sees. Its arithmetic is in
`compress.selections`, in a module of its name.

To add a method: its line in `METHODS`, and `compress/selections/NAME.py` with a function `score`. Nothing else
has to know it; where it sees what no other method sees, the prefill has to capture that too.

Does not know: tensors, models, the wire. Place on the path: ground floor; recipes hold one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from kvlink.codecs.base import require_between, require_one_of
from kvlink.errors import RecipeError

Scope = Literal["shared", "head"]
When = Literal["after", "during"]

METHODS: dict[str, frozenset[str]] = {
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
"""Method → the evidence that it sees, by the fields of `Evidence`; it is given no other."""

PRESS = "press:"
"""Prefix in a recipe of a class of the kvpress package that scores, such as `press:KnormPress`."""
NAMED = tuple(name for name in METHODS if name != "press")
"""Methods as a recipe names them; a press comes with its class."""
SINK_COUNT = 4
RECENT_COUNT = 8
POOL_WIDTH = 5
WINDOW_COUNT = 64


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of the context is kept. `unit`: ratio, count, mass or bytes."""

    value: float
    unit: Literal["ratio", "count", "mass", "bytes"] = "ratio"

    def __post_init__(self) -> None:
        number = self.value
        if not math.isfinite(number):
            raise RecipeError(f"retention must be a finite number, got {number}")
        if self.unit in ("ratio", "mass") and not 0 < number <= 1:
            raise RecipeError(f"retention as a {self.unit} must be above 0 and at most 1, got {number:g}")
        if self.unit in ("count", "bytes") and (number < 1 or number != int(number)):
            raise RecipeError(
                f"retention as {self.unit} must be a whole number of at least 1, got {number:g}"
            )

    def __str__(self) -> str:
        if self.unit == "count":
            return f"{int(self.value)}tok"
        if self.unit == "bytes":
            return f"{int(self.value)}B"
        return f"mass:{self.value!r}" if self.unit == "mass" else repr(float(self.value))

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read `0.25`, `128tok`, `mass:0.9`, `200kB`, `1.5MB`, `900B`. Raises RecipeError."""
        match = re.fullmatch(r"(mass:)?([0-9.eE+-]+)(tok|B|kB|MB)?", text)
        if not match or (match[1] and match[3]):
            raise RecipeError(f"retention must look like 0.25, 128tok, mass:0.9 or 200kB, got {text!r}")
        try:
            number = float(match[2])
        except ValueError:
            raise RecipeError(f"retention: {match[2]!r} is not a number") from None
        if match[1]:
            return cls(number, "mass")
        if match[3] == "tok":
            return cls(number, "count")
        if match[3]:
            return cls(round(number * {"B": 1, "kB": 1_000, "MB": 1_000_000}[match[3]]), "bytes")
        return cls(number)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which positions travel.

    `scope`: one set for all layers and heads (`shared`) or one per layer and KV head (`head`).
    `when`: prune the finished cache (`after`) or prefill without the dropped positions
    (`during`). `sinks` first and `recent` last context tokens are always kept. `pool`: width of
    the average pooling of scores along tokens (odd). `window`: SnapKV's observation window.
    `press`: with the method of that name, a scoring class of the kvpress package.
    """

    method: str = "all"
    amount: Amount = Amount(1.0)
    scope: Scope = "shared"
    when: When = "after"
    sinks: int = SINK_COUNT
    recent: int = RECENT_COUNT
    pool: int = POOL_WIDTH
    window: int = WINDOW_COUNT
    seed: int = 0
    press: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS or (self.method == "press") is not bool(self.press):
            raise RecipeError(
                f"unknown selection {self.method!r}; known: {', '.join(NAMED)}, {PRESS}NAME of a kvpress class"
            )
        if self.press and not re.fullmatch("[A-Za-z][A-Za-z0-9]{0,63}", self.press):
            raise RecipeError(f"{PRESS}NAME needs the name of a kvpress class, got {self.press!r}")
        require_one_of("scope", self.scope, ("shared", "head"))
        require_one_of("when", self.when, ("after", "during"))
        if self.when == "during" and self.scope != "shared":
            raise RecipeError("when=during needs scope=shared: a prefill leaves out whole tokens, not heads")
        for name, low, high in (("sinks", 0, 1024), ("recent", 0, 1024), ("window", 1, 4096)):
            require_between(name, getattr(self, name), low, high)
        require_between("pool", self.pool, 1, 127)
        require_between("seed", self.seed, 0, 2**31 - 1)
        if self.pool % 2 == 0:
            raise RecipeError(f"pool must be odd, got {self.pool}")

    @property
    def name(self) -> str:
        """The method as a recipe names it, `press:NAME` with its class."""
        return PRESS + self.press if self.press else self.method

    def __str__(self) -> str:
        return "all" if self.method == "all" else f"{self.name}@{self.amount}"
