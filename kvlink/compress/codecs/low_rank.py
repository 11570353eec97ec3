"""Low rank: a truncated SVD of one layer's tensor, all heads together, both factors quantized.

Source: Eckart and Young (1936): no matrix of that rank is nearer.
Does not know: which tensor this is. Place on the path: factor, quantize, then code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlink.codecs import LowRank
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.compress.codecs.quantized import decode_matrix, encode_matrix, narrowed
from kvlink.errors import CodecError
from kvlink.payload import Part
from kvlink.recipe import Coder


def encode(
    codec: LowRank, tensor: Tensor, place: Place, coder: Coder, context: CodecContext
) -> tuple[int, tuple[Part, ...]]:
    """Bytes a scale, the same for both factors, and the parts of the left, then the right one."""
    heads, kept, size = tensor.shape
    factors = _factors(tensor, codec.rank_of((heads, kept, size)))
    quantizers = codec.quantizers(place.layer, place.side)
    coded = [encode_matrix(f, q, coder) for f, q in zip(factors, quantizers, strict=True)]
    width = max(coded[0][0], coded[1][0])
    if coded[0][0] != coded[1][0]:
        coded = [encode_matrix(f, q, coder, width) for f, q in zip(factors, quantizers, strict=True)]
    return width, (*coded[0][1], *coded[1][1])


def decode(
    codec: LowRank,
    parts: tuple[Part, ...],
    scale_bytes: int,
    place: Place,
    kind: torch.dtype,
    shape: tuple[int, int, int],
    context: CodecContext,
) -> Tensor:
    """`[H, K, D]` in `kind`."""
    heads, kept, size = shape
    rank = codec.rank_of(shape)
    left_quantizer, right_quantizer = codec.quantizers(place.layer, place.side)
    middle = len(parts) // 2
    left = decode_matrix(parts[:middle], scale_bytes, (1, kept, rank), left_quantizer, torch.float32)
    right = decode_matrix(
        parts[middle:], scale_bytes, (1, rank, heads * size), right_quantizer, torch.float32
    )
    product = left[0] @ right[0]
    return narrowed(product.reshape(kept, heads, size).transpose(0, 1).contiguous(), kind)


def _factors(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[1, K, R]` and `[1, R, Hkv·D]`, float32: truncated SVD of one layer, all heads together."""
    heads, kept, size = tensor.shape
    matrix = tensor.detach().to("cpu", torch.float32).transpose(0, 1).reshape(kept, heads * size)
    if not bool(torch.isfinite(matrix).all()):
        raise CodecError("cannot factor: a number is not finite")
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank])[None].contiguous(), vt[None, :rank].contiguous()
