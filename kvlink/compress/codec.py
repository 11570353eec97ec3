"""Segments of keys and values: a cache to groups of parts, a layer each, and a layer back.

    positions ──▶ map ──▶ coder                     ─┐
    keys, values of a layer ──▶ the segment's codec  ─┴▶ one group after another

Groups are made one at a time: the first can leave while later layers are still to be coded.

Does not know: frames, models, why a position was chosen, any one codec. Place on the path: between
select and frame at the sender, between deframe and the builder at the receiver.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlink.cache import DTYPES, KVCache, LayerCache
from kvlink.codecs import CODECS, Codec
from kvlink.codecs.base import SIDES
from kvlink.compress.codecs import CodecContext, Place
from kvlink.compress.positions import encode_map, position_sets
from kvlink.errors import CodecError
from kvlink.payload import Adds, CacheShape, EncodedTensor, Group, Part, Segment, SegmentHeader
from kvlink.recipe import Coder

_NAMES = {codec: name for name, codec in CODECS.items()}


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """A segment that is still to be coded: `positions` of `cache`, given as for `KVCache.select`; None: all
    that it holds."""

    header: SegmentHeader
    cache: KVCache
    positions: Tensor | None = None

    @classmethod
    def of(
        cls,
        cache: KVCache,
        codec: Codec,
        positions: Tensor | None = None,
        adds: Adds = "positions",
        *,
        rest: bool = False,
        first: bool | None = None,
    ) -> SegmentPlan:
        """`rest`: the positions are all that are missing, or for a refinement all that are there, so that no map
        is needed. `first`: layers with a sliding window come with this segment; where it is not said, unless it
        is a rest."""
        sets = position_sets(cache, positions)
        kept = int(sets.shape[1])
        needs_map = not rest and kept != cache.tokens
        takes_sliding = adds == "positions" and (not rest if first is None else first)
        sliding = takes_sliding and any(layer.sliding for layer in cache.layers)
        return cls(SegmentHeader(adds, codec, kept, len(sets) if needs_map else 0, sliding), cache, positions)


def encode_groups(plan: SegmentPlan, coder: Coder, context: CodecContext | None = None) -> Iterator[Group]:
    """The groups of a segment in their order, each coded when it is asked for, with no more in memory than
    one layer's. `context`: for a transform.

    Raises CodecError where a number is not finite and the codec is not raw or lossless.
    """
    header, cache = plan.header, plan.cache
    if header.map_sets:
        yield encode_map(position_sets(cache, plan.positions), cache.tokens, coder)
    for index, held in enumerate(cache.layers):
        if held.sliding and not header.sliding:
            continue
        yield _encode_layer(
            cache.layer(index, plan.positions), index, _codec(header), coder, context or CodecContext()
        )


def _encode_layer(layer: LayerCache, index: int, codec: Codec, coder: Coder, context: CodecContext) -> Group:
    coded = [
        _encode_tensor(codec, tensor, Place(index, side, layer.positions), coder, context)
        for side, tensor in zip(SIDES, (layer.keys, layer.values), strict=True)
    ]
    parts: tuple[Part, ...] = tuple(part for tensor in coded for part in tensor.parts)
    return Group(parts, tuple(tensor.scale_bytes for tensor in coded))


def encode(plan: SegmentPlan, coder: Coder = "zstd", context: CodecContext | None = None) -> Segment:
    """A whole segment."""
    return Segment(plan.header, tuple(encode_groups(plan, coder, context)))


def decode_layer(
    group: Group,
    header: SegmentHeader,
    layer: int,
    positions: Tensor,
    shape: CacheShape,
    context: CodecContext,
) -> LayerCache:
    """Keys and values of `layer` at `positions` `[Hkv, K]`, on the CPU and in the cache's own dtype.

    Raises CodecError where sizes or counts do not fit the shape.
    """
    codec, size = _codec(header), (shape.kv_heads, positions.shape[1], shape.head_size)
    parts, sides = list(group.parts), []
    if len(group.scale_bytes) != len(SIDES):
        raise CodecError(f"layer {layer}: expected 2 tensors, found {len(group.scale_bytes)}")
    for side, width in zip(SIDES, group.scale_bytes, strict=True):
        count = len(codec.part_sizes(layer, side, size, shape.element_bytes, width))
        coded = EncodedTensor(layer, side, size, width, tuple(parts[:count]))
        del parts[:count]
        sides.append(
            _decode_tensor(codec, coded, Place(layer, side, positions), DTYPES[shape.dtype], context)
        )
    if parts:
        raise CodecError(f"layer {layer}: {len(parts)} parts more than keys and values have")
    return LayerCache(sides[0], sides[1], positions, layer in dict(shape.whole_layers))


@functools.cache
def _arithmetic(codec: type[Codec]) -> Any:
    """The module of a codec of the table."""
    return importlib.import_module(f"kvlink.compress.codecs.{_NAMES[codec]}")


def _encode_tensor(
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


def _decode_tensor(
    codec: Codec, coded: EncodedTensor, place: Place, kind: torch.dtype, context: CodecContext
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


def _codec(header: SegmentHeader) -> Codec:
    if header.codec is None:
        raise CodecError(f"a segment that adds {header.adds} holds no keys and values")
    return header.codec
