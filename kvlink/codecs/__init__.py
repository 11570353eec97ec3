"""Codecs as values: what a recipe may say about how keys and values are coded.

    Quantized    each tensor on its own: raw, lossless, or integers with scales; layers may differ
    LowRank      two factors of each layer, quantized
    Transform    decorrelated coefficients in one step, entropy coded

A codec is a frozen value that owns its words in a recipe, the sizes of the parts it makes, and the
next finer codec. Its fields have the names of its protobuf message, so that the wire needs no code of
its own for it. The arithmetic is in `compress.codecs`, under the same name.

To add one: a module here, its line in `CODECS`, its message in the proto's `Codec`, and a module of the name in
`CODECS` in `compress/codecs`.

Does not know: tensors, models, the wire. Place on the path: ground floor; recipes hold one.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvlink.codecs.base import AUTO_CALIBRATION, NO_CALIBRATION, Codec, PartKind, PartSize
from kvlink.codecs.low_rank import LowRank
from kvlink.codecs.quantized import INTEGER_BITS, LayerOverride, Quantized, Quantizer
from kvlink.codecs.transform import STEP_CODES, Transform, step_code, step_of
from kvlink.errors import RecipeError

CODECS: dict[str, type[Codec]] = {"quantized": Quantized, "low_rank": LowRank, "transform": Transform}
"""By the name of the field in the proto's `Codec`; the first whose `CLAIM` is among the words is taken."""

OPTIONS = frozenset(option for codec in CODECS.values() for option in codec.OPTIONS)
"""Words of a recipe that belong to a codec."""

BARE = "quantizer"
"""The option that a word without `=` fills: `int4`."""


def name_of(codec: Codec) -> str:
    """The name of a codec's kind in `CODECS`."""
    return next(name for name, kind in CODECS.items() if type(codec) is kind)


def codec_from(options: Mapping[str, str]) -> Codec:
    """The codec that the words of a recipe describe. Raises RecipeError."""
    claimed = [name for name, codec in CODECS.items() if codec.CLAIM in options]
    name = claimed[0] if claimed else "quantized"
    for option, value in options.items():
        if option not in CODECS[name].OPTIONS:
            word = value if option == BARE else f"{option}={value}"
            owner = next(codec.CLAIM or "quantizers" for codec in CODECS.values() if option in codec.OPTIONS)
            mine = CODECS[name].CLAIM or "quantizers"
            raise RecipeError(f"{word!r} goes with {owner}, not with {mine}: give one or the other")
    return CODECS[name].read(options)


__all__ = [
    "AUTO_CALIBRATION",
    "BARE",
    "CODECS",
    "INTEGER_BITS",
    "NO_CALIBRATION",
    "OPTIONS",
    "STEP_CODES",
    "Codec",
    "LayerOverride",
    "LowRank",
    "PartKind",
    "PartSize",
    "Quantized",
    "Quantizer",
    "Transform",
    "codec_from",
    "name_of",
    "step_code",
    "step_of",
]
