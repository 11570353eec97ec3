"""The arithmetic of the codecs: keys or values of one layer to parts, and back.

Each codec of `kvlink.codecs` has a module of its name here with two functions:

    encode(codec, tensor, place, coder, context) → (bytes a scale, parts)
    decode(codec, parts, scale_bytes, place, dtype, shape, context) → tensor

Does not know: segments, selections, the wire. Place on the path: under `compress.codec`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, dtype

from kvlink.codecs import Codec, LowRank, Quantized, Transform
from kvlink.compress.codecs import low_rank, quantized, transform
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.errors import CodecError
from kvlink.payload import EncodedTensor, Part
from kvlink.recipe import Coder

Encoded = tuple[int, tuple[Part, ...]]
"""Bytes a scale (2 or 4) and the parts of one tensor."""

_ENCODE: dict[type[Codec], Callable[..., Encoded]] = {
    Quantized: quantized.encode,
    LowRank: low_rank.encode,
    Transform: transform.encode,
}
_DECODE: dict[type[Codec], Callable[..., Tensor]] = {
    Quantized: quantized.decode,
    LowRank: low_rank.decode,
    Transform: transform.decode,
}


def encode_tensor(
    codec: Codec, tensor: Tensor, place: Place, coder: Coder, context: CodecContext
) -> EncodedTensor:
    """The parts of a `[H, K, D]` tensor. Raises CodecError, saying where, for numbers that the codec cannot
    carry."""
    heads, kept, size = tensor.shape
    try:
        scale_bytes, parts = _ENCODE[type(codec)](codec, tensor, place, coder, context)
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
        decode = _DECODE[type(codec)]
        return decode(codec, coded.parts, coded.scale_bytes, place, kind, coded.shape, context)
    except CodecError as error:
        raise CodecError(f"layer {place.layer} {place.side}: {error}") from error


__all__ = ["CodecContext", "Place", "decode_tensor", "encode_tensor"]
