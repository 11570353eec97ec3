"""Selection maps: the positions of a segment as bits, one set for all heads or one for each.

    sets `[S, K]` ─▶ S · ⌈T / 8⌉ bytes, least significant bit first ─▶ coder

Does not know: keys, values, why a position was chosen. Place on the path: the first group of a segment.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvlink.cache import KVCache
from kvlink.compress.lossless import pack_part, unpack_part
from kvlink.errors import CodecError
from kvlink.payload import Group, Part
from kvlink.recipe import Coder


def position_sets(cache: KVCache, positions: Tensor | None = None) -> Tensor:
    """The distinct sets `[S, K]` of `positions`, given as for `KVCache.select`, or of all that `cache` holds:
    one where all heads share it, else one for each head of each layer without a sliding window."""
    full = [index for index, layer in enumerate(cache.layers) if not layer.sliding]
    if not full:
        return torch.arange(cache.tokens)[None]
    if positions is not None and positions.ndim == 1:
        return positions[None]
    each = [cache.layers[index].positions if positions is None else positions[index] for index in full]
    first = each[0][0]
    if all(bool((one == first).all()) for one in each):
        return first[None]
    return torch.cat(each)


def encode_map(sets: Tensor, tokens: int, coder: Coder) -> Group:
    """The map of `sets` `[S, K]`, each of positions in [0, `tokens`)."""
    bitmap = np.zeros((len(sets), tokens), np.uint8)
    np.put_along_axis(bitmap, sets.numpy(), 1, axis=1)
    plain = np.packbits(bitmap, axis=1, bitorder="little").tobytes()
    return Group((pack_part("map", plain, coder),))


def decode_map(part: Part, count: int, kept: int, tokens: int) -> Tensor:
    """`count` sets of `kept` positions in [0, `tokens`), ascending: `[S, K]` int64. Raises CodecError."""
    plain = np.frombuffer(unpack_part(part), np.uint8)
    width = -(-tokens // 8)
    if plain.size != count * width:
        raise CodecError(f"selection map: expected {count * width} bytes, found {plain.size}")
    bits = np.unpackbits(plain.reshape(count, width), axis=1, bitorder="little")
    if bits[:, tokens:].any():
        raise CodecError(f"selection map names a position at or beyond {tokens}")
    found = bits.sum(1)
    if (found != kept).any():
        raise CodecError(f"selection map: expected {kept} positions a set, found {found.tolist()[:4]}")
    return torch.from_numpy(np.nonzero(bits)[1].reshape(count, kept))


def missing_positions(present: Tensor, tokens: int) -> Tensor:
    """The positions in [0, `tokens`) that `present` `[H, K]` lacks: `[H, T − K]` int64, ascending."""
    lacking = torch.ones(present.shape[0], tokens, dtype=torch.bool).scatter_(1, present, False)
    return lacking.nonzero()[:, 1].reshape(present.shape[0], -1)
