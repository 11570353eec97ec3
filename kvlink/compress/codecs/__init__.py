"""The arithmetic of the codecs: keys or values of one layer to parts, and back.

Each codec of `kvlink.codecs.CODECS` has a module of its name here with two functions:

    encode(codec, tensor, place, coder, context) → (bytes a scale, parts)
    decode(codec, parts, scale_bytes, place, dtype, shape, context) → tensor

Does not know: segments, selections, the wire. Place on the path: under `compress.codec`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor, dtype

from kvlink.codecs import CODECS, Codec
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.errors import CodecError
from kvlink.payload import EncodedTensor
from kvlink.recipe import Coder

_NAMES = {codec: name for name, codec in CODECS.items()}


@functools.cache
def _arithmetic(codec: type[Codec]) -> Any:
    """The module of a codec of the table."""
    return importlib.import_module(f"{__name__}.{_NAMES[codec]}")


def encode_tensor(
    codec: Codec, tensor: Tensor, place: Place, coder: Coder, context: CodecContext
) -> EncodedTensor:
    """The parts of a `[H, K, D]` tensor. Raises CodecError, saying where, for numbers that the codec cannot
    carry."""
    heads, kept, size = tensor.shape
    try:
        scale_bytes, parts = _arithmetic(type(codec)).encode(codec, tensor, place, coder, context)
    except CodecError as error:
        raise CodecError(f"layer {place.layer} {place.side}: {error}") from error
    return EncodedTensor(place.layer, place.side, (heads, kept, size), scale_bytes, parts)


def decode_tensor(
    codec: Codec, coded: EncodedTensor, place: Place, kind: dtype, context: CodecContext
) -> Tensor:
    """The `[H, K, D]` tensor in `kind`. Raises CodecError, saying where, for parts that do not fit it."""
    try:
        if coded.scale_bytes not in (2, 4):
            raise CodecError(f"expected 2 or 4 bytes a scale, found {coded.scale_bytes}")
        expected = codec.part_sizes(place.layer, place.side, coded.shape, kind.itemsize, coded.scale_bytes)
        found = [(part.kind, part.plain_bytes) for part in coded.parts]
        if found != expected:
            raise CodecError(f"expected parts {expected}, found {found}")
        decoded: Tensor = _arithmetic(type(codec)).decode(
            codec, coded.parts, coded.scale_bytes, place, kind, coded.shape, context
        )
        return decoded
    except CodecError as error:
        raise CodecError(f"layer {place.layer} {place.side}: {error}") from error


__all__ = ["CodecContext", "Place", "decode_tensor", "encode_tensor"]
