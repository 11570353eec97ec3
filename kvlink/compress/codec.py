"""The codec: a kept cache to an encoded segment and back. The only place where the steps meet.

    positions ──▶ bitmap ──▶ coder                                   ─┐
    keys, values of each layer ──▶ low rank? ──▶ quantize ──▶ coder  ─┤
                           or  ──▶ transform ──▶ rans                 ─┴▶ EncodedSegment

Does not know: frames, models, why a position was chosen. Place on the path: between select and
frame at the sender, between deframe and restore at the receiver.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvlink.cache import DTYPES, KVCache, LayerCache, full_positions
from kvlink.compress import transform
from kvlink.compress.lossless import from_planes, pack_part, split_planes, to_planes, unpack_part
from kvlink.compress.quantize import dequantize, narrowed, quantize
from kvlink.compress.transform import Known
from kvlink.errors import CodecError, RecipeError
from kvlink.payload import (
    CacheShape,
    EncodedSegment,
    EncodedTensor,
    Part,
    factor_quantizers,
    held_tokens,
    plain_sizes,
)
from kvlink.recipe import Coder, Quantizer, Recipe

Side = Literal["keys", "values"]


def encode(
    cache: KVCache, recipe: Recipe, known: Known | None = None, fine: Tensor | None = None
) -> EncodedSegment:
    """Code a cache that has been cut down to its kept positions. `known`: for a transform.

    `fine` `[K]`: with a `rest`, the positions of the finer step; the cache is whole then.

    Raises CodecError where a number is not finite and the recipe is not raw or lossless.
    """
    tensors: list[EncodedTensor] = []
    for index, layer in enumerate(cache.layers):
        for side, tensor in (("keys", layer.keys), ("values", layer.values)):
            try:
                if recipe.transform is not None:
                    tensors.append(
                        _transform(tensor, layer, index, _side(side), recipe, _needed(known), fine)
                    )
                else:
                    tensors.append(_encode_tensor(tensor, index, _side(side), recipe))
            except CodecError as error:
                raise CodecError(f"layer {index} {side}: {error}") from error
    sets = _position_sets(cache) if fine is None else fine[None]
    kept = int(sets.shape[1])
    if kept == cache.tokens:
        return EncodedSegment(kept, 0, None, tuple(tensors))
    bitmap = np.zeros((len(sets), cache.tokens), np.uint8)
    np.put_along_axis(bitmap, sets.numpy(), 1, axis=1)
    plain = np.packbits(bitmap, axis=1, bitorder="little").tobytes()
    return EncodedSegment(kept, len(sets), pack_part("map", plain, recipe.coder), tuple(tensors))


def decode(segment: EncodedSegment, shape: CacheShape, recipe: Recipe, known: Known | None = None) -> KVCache:
    """Rebuild the kept cache, on the CPU and in the cache's own dtype. `known`: for a transform.

    Raises CodecError where sizes, counts or positions do not fit the shape.
    """
    positions = _decode_map(segment, shape)
    whole = dict(shape.whole_layers)
    parts = {(tensor.layer, tensor.side): tensor for tensor in segment.tensors}
    if len(segment.tensors) != 2 * shape.layers or len(parts) != 2 * shape.layers:
        raise CodecError(f"expected keys and values of {shape.layers} layers, found {len(parts)} tensors")
    layers = []
    for index in range(shape.layers):
        held = held_tokens(recipe, shape, index, segment.kept)
        fine = positions[index][0] if recipe.rest is not None and index not in whole else None
        if index in whole or fine is not None:
            places = full_positions(shape.kv_heads, held, shape.tokens - held)
        else:
            places = positions[index]
        sides = []
        for side in ("keys", "values"):
            try:
                tensor = parts[index, _side(side)]
                if recipe.transform is not None:
                    sides.append(_untransform(tensor, shape, places, recipe, _needed(known), fine))
                else:
                    sides.append(_decode_tensor(tensor, shape, held, recipe))
            except (CodecError, KeyError) as error:
                raise CodecError(f"layer {index} {side}: {error}") from error
        layers.append(LayerCache(sides[0], sides[1], places, index in whole))
    return KVCache(tuple(layers), shape.tokens)


def _transform(
    tensor: Tensor,
    layer: LayerCache,
    index: int,
    side: Side,
    recipe: Recipe,
    known: Known,
    fine: Tensor | None,
) -> EncodedTensor:
    heads, kept, size = tensor.shape
    codes = _row_codes(recipe, layer.positions[0], None if layer.sliding else fine)
    width, parts = transform.encode_side(tensor, layer.positions, codes, index, side, recipe, known)
    return EncodedTensor(index, side, (heads, kept, size), width, parts)


def _untransform(
    tensor: EncodedTensor,
    shape: CacheShape,
    positions: Tensor,
    recipe: Recipe,
    known: Known,
    fine: Tensor | None,
) -> Tensor:
    kept = positions.shape[1]
    expected = plain_sizes(recipe, shape, tensor.layer, tensor.side, kept, tensor.scale_bytes)
    found = [(part.kind, part.plain_bytes) for part in tensor.parts]
    if found != expected or tensor.shape != (shape.kv_heads, kept, shape.head_size):
        raise CodecError(f"expected parts {expected}, found {found} of {tensor.shape}")
    dtype = DTYPES[shape.dtype]
    codes = _row_codes(recipe, positions[0], fine)
    return transform.decode_side(tensor, positions, codes, recipe, known, dtype)


def _row_codes(recipe: Recipe, positions: Tensor, fine: Tensor | None) -> Tensor:
    """4 · log2 of the step of each position `[K]`: the rest's where it is not among the fine ones."""
    own = torch.full((len(positions),), recipe.transform or 0)
    if fine is None or recipe.rest is None:
        return own
    return torch.where(torch.isin(positions, fine), own, torch.tensor(recipe.rest))


def _needed(known: Known | None) -> Known:
    if known is None:
        raise RecipeError("a transform needs the model's rotation, which was not given")
    return known


def _side(side: str) -> Side:
    return "keys" if side == "keys" else "values"


def _position_sets(cache: KVCache) -> Tensor:
    """The distinct position sets `[S, K]`: one where all heads share it, else L·Hkv."""
    full = [layer.positions for layer in cache.layers if not layer.sliding]
    if not full:
        return full_positions(1, cache.tokens)
    first = full[0][0]
    if all(bool((positions == first).all()) for positions in full):
        return first[None]
    return torch.cat(full)


def _decode_map(segment: EncodedSegment, shape: CacheShape) -> dict[int, Tensor]:
    """Positions `[Hkv, K]` of each full-attention layer."""
    heads, tokens = shape.kv_heads, shape.tokens
    full = [i for i in range(shape.layers) if i not in dict(shape.whole_layers)]
    if segment.selection_map is None:
        if segment.kept != tokens:
            raise CodecError(f"{segment.kept} of {tokens} positions and no selection map")
        return {index: full_positions(heads, tokens) for index in full}
    if segment.map_sets not in (1, len(full) * heads):
        raise CodecError(f"expected 1 or {len(full) * heads} position sets, found {segment.map_sets}")
    plain = np.frombuffer(unpack_part(segment.selection_map), np.uint8)
    width = -(-tokens // 8)
    if plain.size != segment.map_sets * width:
        raise CodecError(f"selection map: expected {segment.map_sets * width} bytes, found {plain.size}")
    bits = np.unpackbits(plain.reshape(segment.map_sets, width), axis=1, bitorder="little")
    if bits[:, tokens:].any():
        raise CodecError(f"selection map names a position at or beyond {tokens}")
    counts = bits.sum(1)
    if (counts != segment.kept).any():
        raise CodecError(
            f"selection map: expected {segment.kept} positions a set, found {counts.tolist()[:4]}"
        )
    sets = torch.from_numpy(np.nonzero(bits)[1].reshape(segment.map_sets, segment.kept))
    if segment.map_sets == 1:
        return {index: sets.expand(heads, -1) for index in full}
    return {index: sets[i * heads : (i + 1) * heads] for i, index in enumerate(full)}


def _encode_tensor(tensor: Tensor, layer: int, side: Side, recipe: Recipe) -> EncodedTensor:
    quantizer = recipe.quantizers(layer)[side == "values"]
    heads, kept, size = tensor.shape
    rank = min(recipe.rank, kept, heads * size)
    if not rank:
        scale_bytes, parts = _encode_matrix(tensor, quantizer, recipe.coder)
        return EncodedTensor(layer, side, (heads, kept, size), scale_bytes, parts)
    left, right = _factors(tensor, rank)
    quantizers = factor_quantizers(quantizer)
    coded = [_encode_matrix(f, q, recipe.coder) for f, q in zip((left, right), quantizers, strict=True)]
    width = max(coded[0][0], coded[1][0])
    if coded[0][0] != coded[1][0]:  # both factors share one width of scales: the wider
        coded = [
            _encode_matrix(f, q, recipe.coder, width) for f, q in zip((left, right), quantizers, strict=True)
        ]
    return EncodedTensor(layer, side, (heads, kept, size), width, (*coded[0][1], *coded[1][1]))


def _decode_tensor(tensor: EncodedTensor, shape: CacheShape, kept: int, recipe: Recipe) -> Tensor:
    heads, size = shape.kv_heads, shape.head_size
    if tensor.shape != (heads, kept, size):
        raise CodecError(f"expected shape {(heads, kept, size)}, found {tensor.shape}")
    if tensor.scale_bytes not in (2, 4):
        raise CodecError(f"expected 2 or 4 bytes a scale, found {tensor.scale_bytes}")
    expected = plain_sizes(recipe, shape, tensor.layer, tensor.side, kept, tensor.scale_bytes)
    found = [(part.kind, part.plain_bytes) for part in tensor.parts]
    if found != expected:
        raise CodecError(f"expected parts {expected}, found {found}")
    quantizer = recipe.quantizers(tensor.layer)[tensor.side == "values"]
    dtype = DTYPES[shape.dtype]
    rank = min(recipe.rank, kept, heads * size)
    if not rank:
        return _decode_matrix(tensor.parts, tensor, tensor.shape, quantizer, dtype)
    left_q, right_q = factor_quantizers(quantizer)
    middle = len(tensor.parts) // 2
    left = _decode_matrix(tensor.parts[:middle], tensor, (1, kept, rank), left_q, torch.float32)
    right = _decode_matrix(tensor.parts[middle:], tensor, (1, rank, heads * size), right_q, torch.float32)
    product = left[0] @ right[0]
    return narrowed(product.reshape(kept, heads, size).transpose(0, 1).contiguous(), dtype)


def _factors(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[1, K, R]` and `[1, R, Hkv·D]`, float32: truncated SVD of one layer, all heads together."""
    heads, kept, size = tensor.shape
    matrix = tensor.detach().to("cpu", torch.float32).transpose(0, 1).reshape(kept, heads * size)
    if not bool(torch.isfinite(matrix).all()):
        raise CodecError("cannot factor: a number is not finite")
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank])[None].contiguous(), vt[None, :rank].contiguous()


def _encode_matrix(
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


def _decode_matrix(
    parts: tuple[Part, ...],
    tensor: EncodedTensor,
    shape: tuple[int, int, int],
    quantizer: Quantizer,
    dtype: torch.dtype,
) -> Tensor:
    if quantizer.bits == 16:
        if quantizer.lossless and quantizer.axis == "channel":
            data = from_planes(b"".join(unpack_part(part) for part in parts), dtype.itemsize)
            found = torch.frombuffer(bytearray(data), dtype=dtype)
            return found.reshape(shape[0], shape[2], shape[1]).mT.contiguous()
        data = unpack_part(parts[0])
        if quantizer.lossless:
            data = from_planes(data, dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    scales, codes = unpack_part(parts[0]), unpack_part(parts[1])
    return narrowed(dequantize(scales, codes, tensor.scale_bytes, shape, quantizer), dtype)
