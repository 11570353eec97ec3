"""Tensors as they are, in byte planes, or as integers with scales: the uniform group quantizer.

Exact on the wire (little-endian):

    scales  float16 or float32, `[H, lines, groups]`; asymmetric: then the minima in the same order
    codes   one little-endian bit stream of `[H, N, D]` codes in row-major order, `bits` each,
            padded with zeros to a whole number of 8 codes

    axis token:   lines = N tokens,   groups along the D channels
    axis channel: lines = D channels, groups along the N tokens
    (the last group of a line may be shorter)

    asymmetric   x ≈ minimum + scale · code            code in [0, 2^bits - 1]
    symmetric    x ≈ scale · (code - m)                m = 2^(bits-1) - 1, code in [0, 2m]
    1 bit        x ≈ mean ± magnitude                  (symmetric: mean 0); both in `scales`

Stored scales are rounded up and minima down, so that the codes cover the group and the error
is at most half a stored step. Arithmetic is float32 whatever the cache dtype, float64 where
scales are float32. Numbers that are
not finite are refused: a group with one would lose all the others.

Does not know: which tensor this is, the wire. Place on the path: quantize, then code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlink.codecs import Quantized, Quantizer
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.compress.lossless import from_planes, pack_part, split_planes, to_planes, unpack_part
from kvlink.errors import CodecError
from kvlink.payload import Part
from kvlink.recipe import Coder

_FLOAT16_MAX = 65504.0
_FLOAT16_TINY = 6.2e-5


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


def pack_bits(codes: NDArray[np.uint8], bits: int) -> bytes:
    """A little-endian bit stream of `codes`, `bits` each, padded to a multiple of 8 codes."""
    count = -(-codes.size // 8) * 8
    padded = np.zeros(count, np.uint8)
    padded[: codes.size] = codes.ravel()
    if bits == 8:
        return padded.tobytes()
    octets = padded.reshape(-1, 8)
    words = np.zeros(len(octets), "<u8")
    for index in range(8):
        words |= octets[:, index].astype("<u8") << np.uint64(bits * index)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` codes of a stream written by `pack_bits`."""
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw[:count]
    wide = np.zeros((len(raw) // bits, 8), np.uint8)
    wide[:, :bits] = raw.reshape(-1, bits)
    words = wide.view("<u8")[:, 0]
    mask = np.uint64(2**bits - 1)
    codes = np.empty((len(words), 8), np.uint8)
    for index in range(8):
        codes[:, index] = (words >> np.uint64(bits * index)) & mask
    return codes.reshape(-1)[:count]


def quantize(tensor: Tensor, quantizer: Quantizer, scale_bytes: int = 2) -> tuple[bytes, bytes, int]:
    """Scales, codes and bytes per scale of a `[H, N, D]` tensor of any float dtype.

    A scale takes at least `scale_bytes`, 4 where float16 cannot hold the scales.

    Raises CodecError where a number is not finite.
    """
    x = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise CodecError(f"cannot quantize: head {bad[0]}, row {bad[1]}, channel {bad[2]} is not finite")
    lines = x if quantizer.axis == "token" else x.transpose(1, 2)
    parameters = [_parameters(block, quantizer) for block in _blocks(lines, quantizer.group)]
    stored = [torch.cat([p[i] for p in parameters], -1) for i in range(len(parameters[0]))]
    scale_bytes = max(scale_bytes, _scale_bytes(stored[0], stored[-1]))
    stored = _store(stored, quantizer, scale_bytes)
    codes = _apply(_wide(lines, scale_bytes), stored, quantizer, _encode_block, torch.uint8)
    codes = codes if quantizer.axis == "token" else codes.transpose(1, 2)
    dtype = "<f2" if scale_bytes == 2 else "<f4"
    scales = b"".join(part.numpy().astype(dtype).tobytes() for part in stored)
    return scales, pack_bits(codes.contiguous().numpy(), quantizer.bits), scale_bytes


def dequantize(
    scales: bytes, codes: bytes, scale_bytes: int, shape: tuple[int, int, int], quantizer: Quantizer
) -> Tensor:
    """The `[H, N, D]` float32 tensor that scales and codes stand for.

    Raises CodecError where the sizes do not fit the shape or a scale is not finite.
    """
    heads, rows, columns = shape
    count = heads * rows * columns
    flat = unpack_bits(codes, quantizer.bits, count)
    if flat.size != count:
        raise CodecError(f"expected {count} codes, found {flat.size}")
    values = torch.from_numpy(flat.astype(np.float32)).reshape(shape)
    lines = values if quantizer.axis == "token" else values.transpose(1, 2)
    groups = -(-lines.shape[2] // quantizer.group)
    dtype = "<f2" if scale_bytes == 2 else "<f4"
    numbers = np.frombuffer(scales, dtype).astype(np.float32)
    parts = 1 if quantizer.symmetric else 2
    if numbers.size != parts * heads * lines.shape[1] * groups:
        raise CodecError(f"expected {parts * heads * lines.shape[1] * groups} scales, found {numbers.size}")
    if not np.isfinite(numbers).all():
        raise CodecError("a scale is not finite")
    stored = list(torch.from_numpy(numbers).reshape(parts, heads, lines.shape[1], groups))
    wide = _wide(lines, scale_bytes)
    out = _apply(wide, stored, quantizer, _decode_block, wide.dtype)
    if scale_bytes == 4:
        largest = torch.finfo(torch.float32).max
        out = out.clamp_(-largest, largest).float()
    return out if quantizer.axis == "token" else out.transpose(1, 2).contiguous()


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the cache's dtype. What rounding has put just beyond its range is its largest number;
    what is far beyond becomes infinite, and is refused with the cache."""
    largest = torch.finfo(dtype).max
    if bool((tensor.abs() <= largest * (1 + 1 / 64)).all()):
        tensor = tensor.clamp(-largest, largest)
    return tensor.to(dtype)


def _wide(lines: Tensor, scale_bytes: int) -> Tensor:
    """float64 where scales are float32: differences of huge numbers would leave float32."""
    return lines.double() if scale_bytes == 4 else lines


def _blocks(lines: Tensor, group: int) -> list[Tensor]:
    """Views `[H, lines, groups, size]` of all full groups, then of the shorter last one."""
    length = lines.shape[2]
    whole = length // group * group
    blocks = []
    if whole:
        blocks.append(lines[..., :whole].unflatten(-1, (-1, group)))
    if whole < length:
        blocks.append(lines[..., whole:].unsqueeze(2))
    return blocks


def _apply(
    lines: Tensor, stored: list[Tensor], quantizer: Quantizer, step: Callable[..., Tensor], kind: torch.dtype
) -> Tensor:
    """Run `step` on each block of a head with its parameters; the results in place, as `kind`. A head at a
    time: no more than that is there twice."""
    out, at = torch.empty(lines.shape, dtype=kind), 0
    for block, target in zip(_blocks(lines, quantizer.group), _blocks(out, quantizer.group), strict=True):
        groups = slice(at, at + block.shape[2])
        at += block.shape[2]
        for head in range(len(lines)):
            mine = [part[head, :, groups, None] for part in stored]
            target[head].copy_(step(block[head], mine, quantizer))
    return out


def _parameters(block: Tensor, quantizer: Quantizer) -> tuple[Tensor, ...]:
    """Unrounded (scale,) or (scale, minimum) of each group; 1 bit: (magnitude, mean)."""
    if quantizer.bits == 1:
        mean = torch.zeros_like(block[..., 0]) if quantizer.symmetric else block.mean(-1)
        magnitude = (block - mean[..., None]).abs().mean(-1)
        return (magnitude,) if quantizer.symmetric else (magnitude, mean)
    if quantizer.symmetric:
        return (block.abs().amax(-1) / _middle(quantizer.bits),)
    low, high = block.amin(-1), block.amax(-1)
    # The top of the group, kept until the stored minimum is known.
    return high, low


def _scale_bytes(first: Tensor, last: Tensor) -> int:
    """2 where float16 can hold the scales; 4 for very large or altogether tiny tensors."""
    largest = float(torch.maximum(first.abs().amax(), last.abs().amax()))
    return 2 if _FLOAT16_TINY < largest < _FLOAT16_MAX / 2 or largest == 0 else 4


def _store(parameters: list[Tensor], quantizer: Quantizer, scale_bytes: int) -> list[Tensor]:
    """The parameters as they will be read: scales rounded up, minima down, as float32."""
    if quantizer.bits == 1:
        return [_rounded(part, scale_bytes, 0) for part in parameters]
    if quantizer.symmetric:
        return [_rounded(parameters[0], scale_bytes, 1)]
    high, low = parameters
    low = _rounded(low, scale_bytes, -1)
    # Halves first: high - low can leave float32 where both are huge.
    scale = (high / 2 - low / 2) / (2**quantizer.bits - 1) * 2
    return [_rounded(scale, scale_bytes, 1), low]


def _rounded(x: Tensor, scale_bytes: int, direction: int) -> Tensor:
    """x in the stored dtype, not below (1), not above (-1) or nearest to it (0); float32 again."""
    if scale_bytes == 4:
        # float32 arithmetic on the codes rounds too; one step up keeps the top covered.
        return torch.nextafter(x, torch.full_like(x, torch.inf)) if direction > 0 else x
    stored = x.to(torch.float16)
    if direction:
        short = (stored.float() - x) * direction < 0
        stored = torch.where(
            short, torch.nextafter(stored, torch.full_like(stored, direction * torch.inf)), stored
        )
    return stored.float()


def _encode_block(block: Tensor, stored: list[Tensor], quantizer: Quantizer) -> Tensor:
    if quantizer.bits == 1:
        mean = 0.0 if quantizer.symmetric else stored[1]
        return (block >= mean).float()
    scale = stored[0]
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    if quantizer.symmetric:
        middle = _middle(quantizer.bits)
        return (block / step).round_().clamp_(-middle, middle).add_(middle)
    return (block - stored[1]).div_(step).round_().clamp_(0, 2**quantizer.bits - 1)


def _decode_block(codes: Tensor, stored: list[Tensor], quantizer: Quantizer) -> Tensor:
    scale = stored[0]
    if quantizer.bits == 1:
        signed = (codes * 2 - 1) * scale
        return signed if quantizer.symmetric else signed + stored[1]
    if quantizer.symmetric:
        return (codes - _middle(quantizer.bits)).mul_(scale)
    return (codes * scale).add_(stored[1])


def _middle(bits: int) -> int:
    return 2 ** (bits - 1) - 1
