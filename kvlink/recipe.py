"""Recipes: the full description of how a context cache is reduced before it travels.

A recipe is a frozen value with two forms that round-trip: a short text (`parse`, `str`) and, in
`wire`, protobuf.

    text                              send the text, not the cache
    raw                               the cache as it is, all positions
    int8                              8-bit keys and values
    q2c@0.5 int4                      the half that the question attends to, 4 bits
    q2c+draft@0.25 int4 scope=head    ... and the draft of an answer, chosen per head
    int4 svd=32 layers=0:int8;27:int8 low rank; two layers finer
    transform=1.4                     the transform codec; a larger step is smaller and coarser
    q2c+draft@0.25 transform=1 rest=4 a quarter fine, the other positions coarse
    keys=int4/channel/g64/asym values=int4/token/g64/asym coder=zstd    the same in full

Words are separated by spaces and may come in any order. `METHOD@AMOUNT`: a ratio (`0.25`), a
count (`128tok`), a share of the score mass (`mass:0.9`) or a budget for the whole transfer
(`200kB`). Units: ratios in (0, 1], counts in tokens, budgets in bytes (kB = 1000).

Does not know: tensors, models, the wire. Place on the path: ground floor; every room reads it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from kvlink import bounds
from kvlink.codecs import BARE, Codec, Quantized, Transform, codec_from, step_code, step_of
from kvlink.codecs import OPTIONS as CODEC_OPTIONS
from kvlink.codecs.base import require_one_of, whole_number
from kvlink.errors import DeadlineError, RecipeError
from kvlink.payload import DEADLINE_MS, Mode
from kvlink.selection import NAMED, PRESS, Amount, Selection

Coder = Literal["identity", "zstd"]

AUTO = "auto"
"""Stands for the recipe that a model bears, by its profile."""
DEFAULT_RECIPE = AUTO
"""Where nobody names one."""
PLAIN_RECIPE = "int8"
"""Serves every model that loads: what `auto` stands for where nobody has measured how much of a step it bears."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a context cache is reduced: which positions travel, by which codec, through which coder.

    `background`: positions that the selection leaves travel too, behind the others, by this coarser codec,
    so that nothing is missing for another question.
    """

    mode: Mode = "kv"
    selection: Selection = field(default_factory=Selection)
    codec: Codec = field(default_factory=Quantized)
    coder: Coder = "zstd"
    background: Codec | None = None

    def __post_init__(self) -> None:
        require_one_of("mode", self.mode, ("kv", "text"))
        require_one_of("coder", self.coder, ("identity", "zstd"))
        if self.background is not None:
            if self.selection.method == "all" or self.selection.when != "after":
                raise RecipeError("rest needs a selection, made after the prefill: else nothing is left")
            if _background(_background_word(self.background), self.codec) != self.background:
                raise RecipeError(f"rest has its codec's basis, or is a quantizer, got {self.background}")
            if _is_finer(self.background, self.codec):
                raise RecipeError("the rest must not be finer than what is selected")

    @property
    def prunes(self) -> bool:
        """Whether the receiver goes without some positions."""
        return self.mode == "kv" and self.selection.method != "all" and self.background is None

    def with_amount(self, amount: Amount) -> Recipe:
        return replace(self, selection=replace(self.selection, amount=amount))

    def finer(self) -> Recipe | None:
        """The next finer recipe: finer codecs, then all positions; None after them."""
        codec = self.codec.finer()
        if codec is None:
            everything = replace(self, selection=Selection(), background=None)
            return everything if self.selection.method != "all" else None
        if self.background is None:
            return replace(self, codec=codec)
        background = self.background.finer()
        if background is None or type(codec) is not type(self.codec):
            return replace(self, codec=codec, selection=Selection(), background=None)
        return replace(self, codec=codec, background=codec if _is_finer(background, codec) else background)

    def __str__(self) -> str:
        """The full notation: names everything that `parse` needs."""
        if self.mode == "text":
            return "text"
        words = [str(self.selection)]
        defaults = Selection()
        for name in _SELECTION_OPTIONS:
            if self.selection.method != "all" and getattr(self.selection, name) != getattr(defaults, name):
                words.append(f"{name}={getattr(self.selection, name)}")
        rest = [] if self.background is None else [f"rest={_background_word(self.background)}"]
        return " ".join([*words, *self.codec.words(), *rest, f"coder={self.coder}"])

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a preset or a full notation. Raises RecipeError, naming the word that is wrong."""
        if len(text) > bounds.RECIPE.most:
            raise RecipeError(f"a recipe has {bounds.RECIPE}, got {len(text):,}")
        words = text.split()
        if not words:
            raise RecipeError("a recipe is empty; try raw, int8, int4, text or q2c@0.5 int4")
        if words == ["text"]:
            return cls(mode="text")
        found: dict[str, str] = {}
        chosen: dict[str, Any] = {}
        for word in words:
            _read_word(word, found, chosen)
        selection = Selection(**chosen)
        if selection.method == "all" and set(chosen) - {"method"}:
            raise RecipeError(f"selection options without a selection in {text!r}")
        coder = cast(Coder, found.pop("coder", "zstd"))
        rest = found.pop("rest", None)
        codec = codec_from(found)
        return cls("kv", selection, codec, coder, None if rest is None else _background(rest, codec))


@dataclass(frozen=True, slots=True)
class Target:
    """What a message should be like, beyond its recipe; 0 and False ask for nothing.

    `budget_bytes`: most bytes of the transfer. `max_bits`: most bits per element. `quality`: share of
    answers that the step kept when the profile was made. `verify`: with a certificate. `deadline_s`: seconds
    from the request until what has come is enough, so that positions come in order of importance; at most an hour.
    `allow_text`: where nothing can be used by then, the text may come instead.
    """

    budget_bytes: int = 0
    max_bits: float = 0.0
    quality: float = 0.0
    verify: bool = False
    deadline_s: float = 0.0
    allow_text: bool = False

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "max_bits", "quality", "deadline_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise RecipeError(f"{name} must be a number of at least 0, got {value}")
        if self.deadline_s > DEADLINE_MS / 1e3:
            raise RecipeError(f"deadline_s must be at most {DEADLINE_MS / 1e3:g}, got {self.deadline_s:g}")
        if self.allow_text and not self.deadline_s:
            raise RecipeError("allow_text needs a deadline: the text comes where the cache is late")

    def after(self, spent_s: float) -> Target:
        """The same target once seconds of its deadline have passed. Raises DeadlineError where none is left."""
        if not self.deadline_s:
            return self
        if spent_s >= self.deadline_s:
            raise DeadlineError(
                f"the deadline of {self.deadline_s:g} s passed before anything could be packed"
            )
        return replace(self, deadline_s=self.deadline_s - spent_s)

    @property
    def needs_step(self) -> bool:
        """Whether only a codec with a step can meet it."""
        return bool(self.max_bits or self.quality)


_SELECTION_OPTIONS = ("scope", "when", "sinks", "recent", "pool", "window", "seed")


def _read_word(word: str, found: dict[str, str], chosen: dict[str, Any]) -> None:
    """Put what one word says into the words of coding or into the selection's fields."""

    def put(target: dict[str, Any], name: str, value: Any) -> None:
        if name in target:
            raise RecipeError(f"{word!r}: {name} was given twice")
        target[name] = value

    name, _, value = word.partition("=")
    if "@" in word:
        method, _, amount = word.partition("@")
        if method.startswith(PRESS):
            put(chosen, "press", method.removeprefix(PRESS))
            method = "press"
        put(chosen, "method", method)
        put(chosen, "amount", Amount.parse(amount))
    elif word == "all":
        put(chosen, "method", "all")
    elif not value:
        if name == "text":
            raise RecipeError("text stands alone: no cache travels that a recipe could reduce")
        if name in NAMED or name.startswith(PRESS):
            raise RecipeError(f"{name} needs an amount, such as {name}@0.5")
        put(found, BARE, word)
    elif name in _SELECTION_OPTIONS:
        put(chosen, name, value if name in ("scope", "when") else whole_number(name, value))
    elif name in ("coder", "rest") or name in CODEC_OPTIONS:
        put(found, name, value)
    else:
        raise RecipeError(f"unknown word {word!r} in a recipe")


def _background(word: str, codec: Codec) -> Codec:
    """The codec of `rest=WORD`: the same transform in another step, or a quantizer."""
    if re.match("[a-z]", word):
        return codec_from({BARE: word})
    if not isinstance(codec, Transform):
        raise RecipeError(f"rest={word}: a step goes with transform; give a quantizer, such as rest=int2")
    return replace(codec, step_code=step_code("rest", word))


def _background_word(codec: Codec) -> str:
    if isinstance(codec, Transform):
        return f"{step_of(codec.step_code):.4g}"
    return codec.family


def _is_finer(one: Codec, other: Codec) -> bool:
    """Whether `one` is plainly finer than `other`: a smaller step, more bits."""
    if isinstance(one, Transform) and isinstance(other, Transform):
        return one.step_code < other.step_code
    if isinstance(one, Quantized) and isinstance(other, Quantized):
        return one.keys.bits > other.keys.bits
    return False


PRESETS = (
    "text", "raw", "int8", "int4", "q2c@0.5 int4", "q2c+draft@0.25 int4", "transform=1",
    "q2c+draft@0.25 transform=0.5 rest=2",
)  # fmt: skip
"""The recipes that the demo compares."""
