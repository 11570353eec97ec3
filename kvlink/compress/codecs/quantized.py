"""Tensors as they are, in byte planes, or as integers with scales.

Source: `compress.quantize` has the layout of codes and scales.
Does not know: which tensor this is. Place on the path: quantize, then code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlink.codecs import Quantized, Quantizer
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.compress.lossless import from_planes, pack_part, split_planes, to_planes, unpack_part
from kvlink.compress.quantize import dequantize, narrowed, quantize
from kvlink.payload import Part
from kvlink.recipe import Coder


def encode(
    codec: Quantized, tensor: Tensor, place: Place, coder: Coder, context: CodecContext
) -> tuple[int, tuple[Part, ...]]:
    """Bytes a scale and the parts of `[H, K, D]`."""
    return encode_matrix(tensor, codec.of_layer(place.layer, place.side), coder)


def decode(
    codec: Quantized,
    parts: tuple[Part, ...],
    scale_bytes: int,
    place: Place,
    kind: torch.dtype,
    shape: tuple[int, int, int],
    context: CodecContext,
) -> Tensor:
    """`[H, K, D]` in `kind`."""
    return decode_matrix(parts, scale_bytes, shape, codec.of_layer(place.layer, place.side), kind)


def encode_matrix(
    tensor: Tensor, quantizer: Quantizer, coder: Coder, scale_bytes: int = 2
) -> tuple[int, tuple[Part, ...]]:
    """Bytes a scale (at least `scale_bytes`) and the parts of one tensor."""
    if quantizer.bits == 16:
        if quantizer.lossless and quantizer.axis == "channel":
            data = tensor.detach().cpu().mT.contiguous().view(torch.uint8).numpy().tobytes()
            planes = split_planes(data, tensor.element_size())
            return 2, tuple(pack_part("codes", plane, coder) for plane in planes)
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if quantizer.lossless:
            return 2, (pack_part("codes", to_planes(data, tensor.element_size()), coder),)
        # Raw means as it is: no coder touches it, so its cost is plain to see.
        return 2, (Part("codes", "identity", len(data), data),)
    scales, codes, scale_bytes = quantize(tensor, quantizer, scale_bytes)
    return scale_bytes, (pack_part("scales", scales, coder), pack_part("codes", codes, coder))


def decode_matrix(
    parts: tuple[Part, ...],
    scale_bytes: int,
    shape: tuple[int, int, int],
    quantizer: Quantizer,
    kind: torch.dtype,
) -> Tensor:
    """The tensor of `shape` in `kind`."""
    if quantizer.bits == 16:
        if quantizer.lossless and quantizer.axis == "channel":
            data = from_planes(b"".join(unpack_part(part) for part in parts), kind.itemsize)
            found = torch.frombuffer(bytearray(data), dtype=kind)
            return found.reshape(shape[0], shape[2], shape[1]).mT.contiguous()
        data = unpack_part(parts[0])
        if quantizer.lossless:
            data = from_planes(data, kind.itemsize)
        return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
    scales, codes = unpack_part(parts[0]), unpack_part(parts[1])
    return narrowed(dequantize(scales, codes, scale_bytes, shape, quantizer), kind)
