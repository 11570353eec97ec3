"""Recipes: the full description of how a context cache is reduced before it travels.

A recipe is a frozen value with three forms that round-trip: a short text (`parse`, `str`),
JSON (`to_json`, `from_json`) and, in `wire`, protobuf.

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

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

from kvlink import bounds
from kvlink.errors import RecipeError

Mode = Literal["kv", "text"]
Scope = Literal["shared", "head"]
When = Literal["after", "during"]
Axis = Literal["token", "channel"]
Coder = Literal["identity", "zstd"]
STEP_CODES = (-40, 40)
"""Range of a transform's step as 4 · log2: from 1/1024 to 1024."""

METHODS = ("all", "q2c", "q2c+draft", "snapkv", "snapkv+question", "h2o", "streaming", "random")
PRESS = "press:"
"""Prefix of methods that score by a class of the kvpress package, such as `press:KnormPress`."""
INTEGER_BITS = (8, 4, 3, 2, 1)
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

    def __post_init__(self) -> None:
        if self.method not in METHODS and not re.fullmatch(PRESS + "[A-Za-z][A-Za-z0-9]{0,63}", self.method):
            raise RecipeError(
                f"unknown selection {self.method!r}; known: {', '.join(METHODS)}, {PRESS}NAME of a kvpress class"
            )
        _one_of("scope", self.scope, ("shared", "head"))
        _one_of("when", self.when, ("after", "during"))
        if self.when == "during" and self.scope != "shared":
            raise RecipeError("when=during needs scope=shared: a prefill leaves out whole tokens, not heads")
        for name, low, high in (("sinks", 0, 1024), ("recent", 0, 1024), ("window", 1, 4096)):
            _between(name, getattr(self, name), low, high)
        _between("pool", self.pool, 1, 127)
        _between("seed", self.seed, 0, 2**31 - 1)
        if self.pool % 2 == 0:
            raise RecipeError(f"pool must be odd, got {self.pool}")

    def __str__(self) -> str:
        if self.method == "all":
            return "all"
        return f"{self.method}@{self.amount}"


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A uniform group quantizer, or `bits=16`: the numbers as they are.

    `axis`: the axis along which numbers share a scale: `token` (one scale per token and group of
    channels) or `channel` (one scale per channel and group of tokens). `group`: numbers that
    share a scale. `symmetric`: no offset. With 1 bit: sign times mean magnitude around the mean.
    `lossless` (bits=16 only): byte planes, so that the coder finds the regular exponents; along a
    channel's tokens, or (`token`) along a token's channels.
    """

    bits: int = 16
    axis: Axis = "token"
    group: int = 64
    symmetric: bool = False
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (16, *INTEGER_BITS):
            raise RecipeError(f"bits must be one of 16, 8, 4, 3, 2, 1, got {self.bits}")
        _one_of("axis", self.axis, ("token", "channel"))
        _between("group", self.group, 2, 65536)
        if self.lossless and self.bits != 16:
            raise RecipeError(f"lossless has no bits, got {self.bits}")

    def __str__(self) -> str:
        if self.bits == 16:
            planes = "lossless" if self.axis == "channel" else "lossless/token"
            return planes if self.lossless else "raw"
        return f"int{self.bits}/{self.axis}/g{self.group}/{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str, axis: Axis = "token") -> Quantizer:
        """Read `raw`, `lossless`, `int4` or `int4/channel/g64/asym`. Raises RecipeError."""
        head, *rest = text.split("/")
        if head in ("raw", "lossless"):
            if rest and text != "lossless/token":
                raise RecipeError(f"{head} takes no options, got {text!r}")
            return cls(lossless=True, axis="token" if rest else "channel") if head == "lossless" else cls()
        match = re.fullmatch(r"int(\d{1,2})", head)
        if not match or int(match[1]) not in INTEGER_BITS:
            raise RecipeError(f"expected raw, lossless or int8/int4/int3/int2/int1, got {text!r}")
        values: dict[str, Any] = {"axis": axis}
        for word in rest:
            if word in ("token", "channel"):
                values["axis"] = word
            elif word in ("sym", "asym"):
                values["symmetric"] = word == "sym"
            elif re.fullmatch(r"g\d{1,6}", word):
                values["group"] = int(word[1:])
            else:
                raise RecipeError(f"unknown quantizer option {word!r} in {text!r}")
        return cls(int(match[1]), **values)


@dataclass(frozen=True, slots=True)
class LayerOverride:
    """Other quantizers for one layer (mixed precision)."""

    layer: int
    keys: Quantizer
    values: Quantizer

    def __post_init__(self) -> None:
        _between("layer", self.layer, 0, 65535)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a context cache is reduced. `rank` 0 means no low-rank step. See the module's text.

    `transform`: the transform codec in place of quantizers, with a step of 2^(transform / 4) times
    what the model is thought to tolerate. `basis`: `auto` (the sender's profile where it has one),
    `own` (none), or the profile's digest in hex. `rest`: positions that the selection leaves travel
    too, with this coarser step, so that nothing is missing for another question.
    """

    mode: Mode = "kv"
    selection: Selection = field(default_factory=Selection)
    keys: Quantizer = field(default_factory=Quantizer)
    values: Quantizer = field(default_factory=Quantizer)
    rank: int = 0
    coder: Coder = "zstd"
    overrides: tuple[LayerOverride, ...] = ()
    transform: int | None = None
    basis: str = "auto"
    rest: int | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("kv", "text"))
        _one_of("coder", self.coder, ("identity", "zstd"))
        _between("svd", self.rank, 0, 65536)
        layers = [override.layer for override in self.overrides]
        if layers != sorted(set(layers)):
            raise RecipeError(f"layer overrides must be in order and name each layer once, got {layers}")
        if self.rank and (self.keys.lossless or self.values.lossless):
            raise RecipeError("svd and lossless exclude each other")
        self._check_transform()

    def _check_transform(self) -> None:
        if self.basis not in ("auto", "own") and not re.fullmatch("[0-9a-f]{32}", self.basis):
            raise RecipeError(f"basis must be auto, own or a profile's 32 hex digits, got {self.basis!r}")
        if self.transform is None:
            if self.basis != "auto" or self.rest is not None:
                raise RecipeError("a basis and a rest belong to a transform")
            return
        _between("transform", self.transform, *STEP_CODES)
        if (self.keys, self.values, self.rank, self.overrides) != (Quantizer(), Quantizer(), 0, ()):
            raise RecipeError(
                "transform takes the place of quantizers, svd and layers: give one or the other"
            )
        if self.rest is not None:
            _between("rest", self.rest, *STEP_CODES)
            chosen = self.selection
            if chosen.method == "all" or (chosen.scope, chosen.when) != ("shared", "after"):
                raise RecipeError("rest needs a selection, shared by all heads and after the prefill")
            if self.rest < self.transform:
                raise RecipeError("the rest's step must not be finer than the transform's own")

    def quantizers(self, layer: int) -> tuple[Quantizer, Quantizer]:
        """The quantizers of keys and values of a layer."""
        for override in self.overrides:
            if override.layer == layer:
                return override.keys, override.values
        return self.keys, self.values

    def with_amount(self, amount: Amount) -> Recipe:
        return replace(self, selection=replace(self.selection, amount=amount))

    def __str__(self) -> str:
        """The full notation: names everything that `parse` needs."""
        if self.mode == "text":
            return "text"
        words = [str(self.selection)]
        defaults = Selection()
        for name in ("scope", "when", "sinks", "recent", "pool", "window", "seed"):
            if self.selection.method != "all" and getattr(self.selection, name) != getattr(defaults, name):
                words.append(f"{name}={getattr(self.selection, name)}")
        if self.transform is not None:
            words.append(f"transform={step_of(self.transform):.4g}")
            if self.rest is not None:
                words.append(f"rest={step_of(self.rest):.4g}")
            if self.basis != "auto":
                words.append(f"basis={self.basis}")
            return " ".join([*words, f"coder={self.coder}"])
        words += [f"keys={self.keys}", f"values={self.values}"]
        if self.rank:
            words.append(f"svd={self.rank}")
        words.append(f"coder={self.coder}")
        if self.overrides:
            words.append("layers=" + ";".join(_override_text(override) for override in self.overrides))
        return " ".join(words)

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
        found: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        for word in words:
            _read_word(word, found, chosen)
        try:
            selection = Selection(**chosen)
        except TypeError as error:  # pragma: no cover - the table below names only real fields
            raise RecipeError(str(error)) from error
        if selection.method == "all" and set(chosen) - {"method"}:
            raise RecipeError(f"selection options without a selection in {text!r}")
        return cls(selection=selection, **found)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote; unknown or missing fields raise RecipeError."""
        if len(text) > bounds.RECIPE_JSON.most:
            raise RecipeError(f"a recipe as JSON has {bounds.RECIPE_JSON}, got {len(text):,}")
        try:
            data = json.loads(text)
            chosen = dict(data.pop("selection"))
            chosen["amount"] = Amount(**chosen["amount"])
            overrides = tuple(
                LayerOverride(item["layer"], Quantizer(**item["keys"]), Quantizer(**item["values"]))
                for item in data.pop("overrides")
            )
            keys, values = Quantizer(**data.pop("keys")), Quantizer(**data.pop("values"))
            return cls(selection=Selection(**chosen), keys=keys, values=values, overrides=overrides, **data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RecipeError(f"not a recipe in JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Wish:
    """What a message should be like, beyond its recipe; 0 and False ask for nothing.

    `budget_bytes`: most bytes of the transfer. `max_bits`: most bits per element. `quality`: share of
    answers that the step kept when the profile was made. `verify`: with a certificate.
    """

    budget_bytes: int = 0
    max_bits: float = 0.0
    quality: float = 0.0
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "max_bits", "quality"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise RecipeError(f"{name} must be a number of at least 0, got {value}")


_SELECTION_OPTIONS = ("scope", "when", "sinks", "recent", "pool", "window", "seed")


def _read_word(word: str, found: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Put what one word says into the recipe's or the selection's fields."""

    def put(target: dict[str, Any], name: str, value: Any) -> None:
        if name in target:
            raise RecipeError(f"{word!r}: {name} was given twice")
        target[name] = value

    name, _, value = word.partition("=")
    if "@" in word:
        method, _, amount = word.partition("@")
        put(chosen, "method", method)
        put(chosen, "amount", Amount.parse(amount))
    elif word == "all":
        put(chosen, "method", "all")
    elif not value:
        if name == "text":
            raise RecipeError("text stands alone: no cache travels that a recipe could reduce")
        if name in METHODS or name.startswith(PRESS):
            raise RecipeError(f"{name} needs an amount, such as {name}@0.5")
        keys = Quantizer.parse(word, "channel")
        put(found, "keys", keys)
        put(found, "values", Quantizer.parse(word, "token"))
    elif name in ("keys", "values"):
        put(found, name, Quantizer.parse(value, "channel" if name == "keys" else "token"))
    elif name in _SELECTION_OPTIONS:
        put(chosen, name, value if name in ("scope", "when") else _whole(name, value))
    elif name == "svd":
        put(found, "rank", _whole(name, value))
    elif name in ("transform", "rest"):
        put(found, name, _step_code(name, value))
    elif name == "basis":
        put(found, "basis", value)
    elif name == "coder":
        put(found, "coder", cast(Coder, value))
    elif name == "layers":
        put(found, "overrides", tuple(_override(item) for item in value.split(";")))
    else:
        raise RecipeError(f"unknown word {word!r} in a recipe")


def step_of(code: int) -> float:
    """The step that a code stands for: codes are a quarter of an octave apart, 0 is a step of 1."""
    return float(2 ** (code / 4))


def _step_code(name: str, text: str) -> int:
    """The code of the step nearest to `text`."""
    try:
        step = float(text)
    except ValueError:
        raise RecipeError(f"{name} must be a step such as 1 or 1.5, got {text!r}") from None
    if not step_of(STEP_CODES[0]) <= step <= step_of(STEP_CODES[1]):
        raise RecipeError(f"{name} must be a step from 1/1024 to 1024, got {text!r}")
    return round(4 * math.log2(step))


def _override(text: str) -> LayerOverride:
    """Read `3:int8` (keys and values) or `3:int8/channel/g32/asym,int8/token/g32/asym`."""
    layer, _, rest = text.partition(":")
    keys, _, values = rest.partition(",")
    return LayerOverride(
        _whole("layers", layer), Quantizer.parse(keys, "channel"), Quantizer.parse(values or keys, "token")
    )


def _override_text(override: LayerOverride) -> str:
    return f"{override.layer}:{override.keys},{override.values}"


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text):
        raise RecipeError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _between(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


PRESETS = (
    "text", "raw", "int8", "int4", "q2c@0.5 int4", "q2c+draft@0.25 int4", "transform=1",
    "q2c+draft@0.25 transform=0.5 rest=2",
)  # fmt: skip
"""The recipes that the demo compares."""
