"""The codec: a kept cache to an encoded segment and back. The only place where the steps meet.

    positions ──▶ bitmap ──▶ coder                         ─┐
    keys, values of each layer ──▶ the recipe's codec       ─┴▶ EncodedSegment

Does not know: frames, models, why a position was chosen, any one codec. Place on the path: between
select and frame at the sender, between deframe and restore at the receiver.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvlink.cache import DTYPES, KVCache, LayerCache, full_positions
from kvlink.codecs import Codec
from kvlink.codecs.base import SIDES, Side
from kvlink.compress.codecs import CodecContext, Place, decode_tensor, encode_tensor
from kvlink.compress.lossless import pack_part, unpack_part
from kvlink.errors import CodecError
from kvlink.payload import CacheShape, EncodedSegment, EncodedTensor
from kvlink.recipe import Recipe


def encode(
    cache: KVCache, recipe: Recipe, context: CodecContext | None = None, fine: Tensor | None = None
) -> EncodedSegment:
    """Code a cache that has been cut down to its kept positions. `context`: for a transform.

    `fine` `[K]`: with a `rest`, the positions of the finer step; the cache is whole then.

    Raises CodecError where a number is not finite and the recipe is not raw or lossless.
    """
    context = context or CodecContext()
    tensors: list[EncodedTensor] = []
    for index, layer in enumerate(cache.layers):
        for side, tensor in _sides(layer):
            place = Place(index, side, layer.positions, None if layer.sliding else fine)
            tensors.append(encode_tensor(recipe.codec, tensor, place, recipe.coder, context))
    sets = _position_sets(cache) if fine is None else fine[None]
    kept = int(sets.shape[1])
    if kept == cache.tokens:
        return EncodedSegment(kept, 0, None, tuple(tensors))
    bitmap = np.zeros((len(sets), cache.tokens), np.uint8)
    np.put_along_axis(bitmap, sets.numpy(), 1, axis=1)
    plain = np.packbits(bitmap, axis=1, bitorder="little").tobytes()
    return EncodedSegment(kept, len(sets), pack_part("map", plain, recipe.coder), tuple(tensors))


def decode(
    segment: EncodedSegment, shape: CacheShape, recipe: Recipe, context: CodecContext | None = None
) -> KVCache:
    """Rebuild the kept cache, on the CPU and in the cache's own dtype. `context`: for a transform.

    Raises CodecError where sizes, counts or positions do not fit the shape.
    """
    context = context or CodecContext()
    positions = _decode_map(segment, shape)
    whole = dict(shape.whole_layers)
    coded = {(tensor.layer, tensor.side): tensor for tensor in segment.tensors}
    if len(segment.tensors) != 2 * shape.layers or len(coded) != 2 * shape.layers:
        raise CodecError(f"expected keys and values of {shape.layers} layers, found {len(coded)} tensors")
    layers = []
    for index in range(shape.layers):
        held = shape.held_tokens(index, shape.tokens if recipe.covers_all else segment.kept)
        fine = positions[index][0] if recipe.covers_all and index not in whole else None
        if index in whole or fine is not None:
            places = full_positions(shape.kv_heads, held, shape.tokens - held)
        else:
            places = positions[index]
        keys, values = (
            _decode_side(coded, shape, Place(index, side, places, fine), recipe.codec, context)
            for side in SIDES
        )
        layers.append(LayerCache(keys, values, places, index in whole))
    return KVCache(tuple(layers), shape.tokens)


def _decode_side(
    coded: dict[tuple[int, Side], EncodedTensor],
    shape: CacheShape,
    place: Place,
    codec: Codec,
    context: CodecContext,
) -> Tensor:
    tensor = coded.get((place.layer, place.side))
    expected = (shape.kv_heads, place.positions.shape[1], shape.head_size)
    if tensor is None or tensor.shape != expected:
        found = "none" if tensor is None else tensor.shape
        raise CodecError(f"layer {place.layer} {place.side}: expected shape {expected}, found {found}")
    return decode_tensor(codec, tensor, place, DTYPES[shape.dtype], context)


def _sides(layer: LayerCache) -> tuple[tuple[Side, Tensor], tuple[Side, Tensor]]:
    return ("keys", layer.keys), ("values", layer.values)


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
