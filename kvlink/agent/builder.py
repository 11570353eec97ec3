"""The builder: closed segments in, a usable cache out.

    open(header) ─▶ add(place, group) … ─▶ close() ─▶ cache

Each group is decoded when it comes and counts from the close of its segment on. A cache that was handed
out is never changed: positions that are added or refined make new tensors, so answers that run on the old one go on.

Does not know: frames, sockets, models. Place on the path: after deframe, before restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.codecs import Codec
from kvlink.compress.codec import decode_layer
from kvlink.compress.codecs import CodecContext
from kvlink.compress.positions import decode_map, missing_positions
from kvlink.errors import CodecError
from kvlink.payload import CacheShape, Group, Segment, SegmentHeader
from kvlink.wire.layout import GroupPlace, groups_of

ContextOf = Callable[[Codec], CodecContext]
"""What is known of the model for a codec. Raises IdentityError where a calibration is not here."""


class Builder:
    """A cache of `shape` that grows by segments."""

    def __init__(self, shape: CacheShape, context_of: ContextOf, base: KVCache | None = None) -> None:
        """`base`: a cache to add to, of the same model and of no more tokens; it is copied. Raises CodecError."""
        self.shape = shape
        self.segments = 0
        self._context_of = context_of
        self._layers: dict[int, LayerCache] = {} if base is None else _copied(base, shape)
        self._arrived: dict[int, LayerCache] = {}
        self._header: SegmentHeader | None = None
        self._context = CodecContext()
        self._sets: Tensor | None = None

    @property
    def cache(self) -> KVCache | None:
        """What the closed segments make, None before the first."""
        if len(self._layers) != self.shape.layers:
            return None
        return KVCache(tuple(self._layers[index] for index in range(self.shape.layers)), self.shape.tokens)

    def open(self, header: SegmentHeader) -> None:
        """Begin a segment. Raises IdentityError where its codec needs what is not here."""
        self._header, self._sets, self._arrived = header, None, {}
        if header.codec is not None:
            self._context = self._context_of(header.codec)

    def add(self, place: GroupPlace, group: Group) -> None:
        """Take the next group. Raises CodecError."""
        header = self._opened()
        if place.kind == "map":
            self._sets = decode_map(group.parts[0], header.map_sets, header.kept, self.shape.tokens)
            return
        positions = self._positions(place.layer)
        self._arrived[place.layer] = decode_layer(
            group, header, place.layer, positions, self.shape, self._context
        )

    def close(self) -> None:
        """The segment is whole and its digest matched: from now on it counts. Raises CodecError."""
        header = self._opened()
        put = refined if header.adds == "refinement" else joined
        for index, layer in self._arrived.items():
            there = None if layer.sliding else self._layers.get(index)
            self._layers[index] = layer if there is None else put(there, layer)
        self._header, self._arrived = None, {}
        self.segments += 1

    def _opened(self) -> SegmentHeader:
        if self._header is None:
            raise CodecError("no segment is open")
        return self._header

    def _positions(self, layer: int) -> Tensor:
        """Positions `[Hkv, K]` of a layer in the open segment."""
        header, heads, tokens = self._opened(), self.shape.kv_heads, self.shape.tokens
        sliding = dict(self.shape.whole_layers)
        if layer in sliding:
            return full_positions(heads, sliding[layer], tokens - sliding[layer])
        if self._sets is not None:
            if len(self._sets) == 1:
                return self._sets.expand(heads, -1)
            order = sum(index not in sliding for index in range(layer))
            return self._sets[order * heads : (order + 1) * heads]
        there = self._layers.get(layer)
        if header.adds == "refinement":
            return there.positions if there is not None else full_positions(heads, 0)
        return full_positions(heads, tokens) if there is None else missing_positions(there.positions, tokens)


def _copied(base: KVCache, shape: CacheShape) -> dict[int, LayerCache]:
    """The layers of `base` that stand in a cache of `shape` too: those with a sliding window see the last tokens
    only, and are another's where the context is longer. Copies, since whoever holds `base` may wipe it."""
    there = base.shape
    for name in ("layers", "kv_heads", "head_size", "dtype"):
        if getattr(there, name) != getattr(shape, name):
            raise CodecError(
                f"the base has other {name.replace('_', ' ')}: {getattr(there, name)}, expected {getattr(shape, name)}"
            )
    if there.tokens > shape.tokens:
        raise CodecError(f"the base stands for {there.tokens} tokens, the transfer for {shape.tokens}")
    return {
        index: LayerCache(layer.keys.clone(), layer.values.clone(), layer.positions.clone(), layer.sliding)
        for index, layer in enumerate(base.layers)
        if not layer.sliding or there.tokens == shape.tokens
    }


def joined(there: LayerCache, more: LayerCache) -> LayerCache:
    """Both layers' positions, in order. Raises CodecError where one comes twice."""
    positions, order = torch.cat((there.positions, more.positions), 1).sort(dim=1)
    if bool((positions[:, 1:] == positions[:, :-1]).any()):
        raise CodecError("a position comes in two segments")
    keys, values = (
        torch.cat(both, 1).gather(1, order[..., None].expand(-1, -1, both[0].shape[-1]))
        for both in ((there.keys, more.keys), (there.values, more.values))
    )
    return LayerCache(keys, values, positions, there.sliding)


def refined(there: LayerCache, finer: LayerCache) -> LayerCache:
    """The layer with the finer numbers in their places. Raises CodecError where a position is not there."""
    at = torch.searchsorted(there.positions.contiguous(), finer.positions.contiguous())
    at = at.clamp(max=there.positions.shape[1] - 1)
    if not bool((there.positions.gather(1, at) == finer.positions).all()):
        raise CodecError("a refinement names a position that is not there")
    keys, values = (
        own.scatter(1, at[..., None].expand(-1, -1, own.shape[-1]), new)
        for own, new in ((there.keys, finer.keys), (there.values, finer.values))
    )
    return LayerCache(keys, values, there.positions, there.sliding)


def restored(
    segments: Iterable[Segment], shape: CacheShape, context_of: ContextOf, base: KVCache | None = None
) -> KVCache:
    """The cache that segments make of `base`, or of nothing. Raises CodecError, and what `context_of` raises."""
    builder = Builder(shape, context_of, base)
    for segment in segments:
        builder.open(segment.header)
        for place, group in zip(groups_of(segment.header, shape), segment.groups, strict=True):
            builder.add(place, group)
        builder.close()
    if builder.cache is None:
        raise CodecError("the segments bring no whole cache")
    return builder.cache
