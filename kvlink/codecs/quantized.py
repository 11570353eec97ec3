"""Every tensor on its own: as it is, lossless in byte planes, or integers that share scales.

    raw   lossless   int8   int4/channel/g64/asym   keys=int4/… values=int2/…   layers=0:int8;27:int8

Does not know: tensors, bytes. Place on the path: ground floor; arithmetic in `compress.codecs.quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from kvlink.bounds import LAYERS, Inner, Many, Rule
from kvlink.codecs.base import Codec, PartSize, Side, require_between, require_one_of, whole_number
from kvlink.errors import RecipeError

Axis = Literal["token", "channel"]
INTEGER_BITS = (8, 4, 3, 2, 1)
_MORE_BITS = {1: 2, 2: 3, 3: 4, 4: 8, 8: 16}


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
        require_one_of("axis", self.axis, ("token", "channel"))
        require_between("group", self.group, 2, 65536)
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
        match = re.fullmatch(r"int([0-9]{1,2})", head)
        if not match or int(match[1]) not in INTEGER_BITS:
            raise RecipeError(f"expected raw, lossless or int8/int4/int3/int2/int1, got {text!r}")
        values: dict[str, Any] = {"axis": axis}
        for word in rest:
            if word in ("token", "channel"):
                values["axis"] = word
            elif word in ("sym", "asym"):
                values["symmetric"] = word == "sym"
            elif re.fullmatch(r"g[0-9]{1,6}", word):
                values["group"] = int(word[1:])
            else:
                raise RecipeError(f"unknown quantizer option {word!r} in {text!r}")
        return cls(int(match[1]), **values)

    def part_sizes(self, shape: tuple[int, int, int], element_bytes: int, scale_bytes: int) -> list[PartSize]:
        """Kinds and plain bytes of the parts of a `[H, N, D]` tensor."""
        heads, rows, columns = shape
        count = heads * rows * columns
        if self.bits == 16 and self.lossless and self.axis == "channel":
            return [("codes", count)] * element_bytes  # each plane has statistics, and so a part, of its own
        if self.bits == 16:
            return [("codes", count * element_bytes)]
        lines, length = (rows, columns) if self.axis == "token" else (columns, rows)
        groups = heads * lines * -(-length // self.group)
        scales = groups * scale_bytes * (1 if self.symmetric else 2)
        return [("scales", scales), ("codes", -(-count // 8) * self.bits)]

    def finer(self) -> Quantizer:
        """More bits; the numbers as they are after 8."""
        bits = _MORE_BITS.get(self.bits, 16)
        if bits == 16:
            return self if self.bits == 16 else Quantizer()
        return replace(self, bits=bits)


@dataclass(frozen=True, slots=True)
class LayerOverride:
    """Other quantizers for one layer (mixed precision)."""

    layer: int
    keys: Quantizer
    values: Quantizer

    def __post_init__(self) -> None:
        require_between("layer", self.layer, 0, 65535)

    def __str__(self) -> str:
        return f"{self.layer}:{self.keys},{self.values}"

    @classmethod
    def parse(cls, text: str) -> LayerOverride:
        """Read `3:int8` (keys and values) or `3:int8/channel/g32/asym,int8/token/g32/asym`."""
        layer, _, rest = text.partition(":")
        keys, _, values = rest.partition(",")
        return cls(
            whole_number("layers", layer),
            Quantizer.parse(keys, "channel"),
            Quantizer.parse(values or keys, "token"),
        )


@dataclass(frozen=True, slots=True)
class Quantized(Codec):
    """Quantizers of keys and values; `overrides` in the order of their layers, each named once."""

    keys: Quantizer = Quantizer()
    values: Quantizer = Quantizer()
    overrides: tuple[LayerOverride, ...] = ()

    CLAIM: ClassVar[str] = ""
    OPTIONS: ClassVar[frozenset[str]] = frozenset({"quantizer", "keys", "values", "layers"})
    FIELDS: ClassVar[Mapping[str, Rule]] = {
        "keys": Inner(),
        "values": Inner(),
        "overrides": Many(LAYERS.most),
    }

    def __post_init__(self) -> None:
        layers = [override.layer for override in self.overrides]
        if layers != sorted(set(layers)):
            raise RecipeError(f"layer overrides must be in order and name each layer once, got {layers}")

    @classmethod
    def read(cls, options: Mapping[str, str]) -> Quantized:
        bare = options.get("quantizer")
        for name in ("keys", "values"):
            if bare is not None and name in options:
                raise RecipeError(f"{name} were given twice, by {bare!r} and by {name}=")
        overrides = options["layers"].split(";") if "layers" in options else ()
        return cls(
            Quantizer.parse(options.get("keys", bare or "raw"), "channel"),
            Quantizer.parse(options.get("values", bare or "raw"), "token"),
            tuple(LayerOverride.parse(item) for item in overrides),
        )

    def words(self) -> list[str]:
        layers = [f"layers={';'.join(map(str, self.overrides))}"] if self.overrides else []
        return [f"keys={self.keys}", f"values={self.values}", *layers]

    @property
    def family(self) -> str:
        """`raw`, `lossless`, `int4`; `int4/token` where keys share scales along a token."""
        kind = str(self.keys).partition("/")[0]
        return f"{kind}/token" if kind.startswith("int") and self.keys.axis == "token" else kind

    def of_layer(self, layer: int, side: Side) -> Quantizer:
        """The quantizer of one tensor."""
        for override in self.overrides:
            if override.layer == layer:
                return override.keys if side == "keys" else override.values
        return self.keys if side == "keys" else self.values

    def part_sizes(
        self, layer: int, side: Side, shape: tuple[int, int, int], element_bytes: int, scale_bytes: int
    ) -> list[PartSize]:
        return self.of_layer(layer, side).part_sizes(shape, element_bytes, scale_bytes)

    def finer(self) -> Codec | None:
        if self.exact:
            return None
        return Quantized(self.keys.finer(), self.values.finer())

    @property
    def exact(self) -> bool:
        return all(
            q.bits == 16
            for q in (self.keys, self.values, *(q for o in self.overrides for q in (o.keys, o.values)))
        )
