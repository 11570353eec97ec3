"""What a segment header promises: its groups, and kinds and sizes of their parts, before any byte is taken.

    header + shape ─▶ groups in order: the map, then layers            (or a text)
    group + scale widths ─▶ kinds and plain sizes of its parts

Does not know: frames, tensors, the arithmetic of a codec. Place on the path: under the sessions; the
builder reads groups by the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvlink.codecs.base import SIDES, PartSize
from kvlink.errors import RemoteProtocolError
from kvlink.payload import Base, CacheShape, SegmentHeader
from kvlink.recipe import Recipe

GroupKind = Literal["map", "layer", "text"]


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """What a group of a segment is: the map, the text, or the layer `layer` with `rows` positions."""

    kind: GroupKind
    layer: int = 0
    rows: int = 0

    @property
    def tensors(self) -> int:
        return len(SIDES) if self.kind == "layer" else 0


def groups_of(header: SegmentHeader, shape: CacheShape) -> list[GroupPlace]:
    """The groups of a segment, in their order on the wire."""
    if header.adds == "text":
        return [GroupPlace("text")]
    places = [GroupPlace("map")] if header.map_sets else []
    sliding = dict(shape.whole_layers)
    for layer in range(shape.layers):
        if layer not in sliding:
            places.append(GroupPlace("layer", layer, header.kept))
        elif header.sliding:
            places.append(GroupPlace("layer", layer, sliding[layer]))
    return places


def part_sizes(
    place: GroupPlace, header: SegmentHeader, shape: CacheShape, scale_bytes: bytes, text_bytes: int
) -> list[PartSize]:
    """Kinds and plain sizes of a group's parts. Raises RemoteProtocolError for impossible scale widths."""
    if len(scale_bytes) != place.tensors or set(scale_bytes) - {2, 4}:
        raise RemoteProtocolError(f"expected {place.tensors} scale widths of 2 or 4 bytes")
    if place.kind == "text":
        return [("text", text_bytes)]
    if place.kind == "map":
        return [("map", header.map_sets * -(-shape.tokens // 8))]
    if header.codec is None:
        raise RemoteProtocolError("a segment of positions names its codec")
    tensor = (shape.kv_heads, place.rows, shape.head_size)
    sizes: list[PartSize] = []
    for side, width in zip(SIDES, scale_bytes, strict=True):
        sizes += header.codec.part_sizes(place.layer, side, tensor, shape.element_bytes, width)
    return sizes


def kept_tokens(headers: Sequence[SegmentHeader], recipe: Recipe) -> int:
    """Positions of each set that a selection brings, or makes finer: those of all segments but a background. 0 for
    a text, and where nothing was missing."""
    background = recipe.background if recipe.background != recipe.codec else None
    return sum(one.kept for one in headers if one.adds != "text" and one.codec != background)


def kept_share(headers: Sequence[SegmentHeader], shape: CacheShape, base: Base | None = None) -> float:
    """Share of a context's positions that are there with `base` and the segments, mean over layers and heads:
    1 is all, and a text."""
    if any(one.adds == "text" for one in headers):
        return 1.0
    held = [shape.held_tokens(layer, shape.tokens) for layer in range(shape.layers)]
    kept = [shape.held_tokens(layer, base.kept) if base else 0 for layer in range(shape.layers)]
    for one in headers:
        for place in groups_of(one, shape) if one.adds == "positions" else ():
            kept[place.layer] += place.rows if place.kind == "layer" else 0
    return sum(map(min, kept, held)) / sum(held)


def check_header(header: SegmentHeader, shape: CacheShape, present: int, sliding_due: bool) -> None:
    """Raise RemoteProtocolError unless a segment of positions or of a refinement can follow where each set has
    `present` of T positions. `sliding_due`: layers with a sliding window, where there are some, are not there."""
    if header.codec is None:
        raise RemoteProtocolError("a segment of positions names its codec")
    most = shape.tokens - present if header.adds == "positions" else present
    if not 1 <= header.kept <= most:
        raise RemoteProtocolError(f"kept must be from 1 to {most}, found {header.kept}")
    every_set = (shape.layers - len(shape.whole_layers)) * shape.kv_heads
    allowed = (0,) if header.kept == most else (1, every_set)
    if header.map_sets not in allowed:
        raise RemoteProtocolError(f"expected {allowed} position sets, found {header.map_sets}")
    if header.sliding is not (header.adds == "positions" and sliding_due and bool(shape.whole_layers)):
        raise RemoteProtocolError("layers with a sliding window come in the first segment of positions")
