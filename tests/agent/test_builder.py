"""The builder: whatever the segments, their cache is the cache that they were cut from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlink.agent.builder import Builder, restored
from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.codecs import Codec, Quantized, Quantizer
from kvlink.compress.codec import SegmentPlan, encode
from kvlink.compress.codecs import CodecContext
from kvlink.errors import CodecError
from kvlink.payload import Segment
from kvlink.wire.layout import groups_of
from tests.wire.samples import make_cache

RAW, INT2 = Quantized(), Quantized(Quantizer(2), Quantizer(2))


def nothing_known(codec: Codec) -> CodecContext:
    return CodecContext()


def same(one: KVCache, other: KVCache) -> bool:
    return one.tokens == other.tokens and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one.layers, other.layers, strict=True)
        for name in ("keys", "values", "positions")
    )


def with_window(cache: KVCache, held: int) -> KVCache:
    """The cache with a last layer that holds a window of `held` tokens."""
    layer = cache.layers[-1]
    heads, tokens = layer.positions.shape
    slid = LayerCache(
        layer.keys[:, -held:], layer.values[:, -held:], full_positions(heads, held, tokens - held), True
    )
    return KVCache((*cache.layers[:-1], slid), tokens)


def refinement(cache: KVCache, codec: Codec) -> Segment:
    return encode(SegmentPlan.of(cache, codec, adds="refinement"))


@st.composite
def cuts(draw):
    """A cache and its positions in a random order, cut into pieces; for all heads or for each its own."""
    tokens = draw(st.integers(2, 24))
    cache = make_cache(3, 2, tokens, 4, draw(st.integers(0, 9)))
    if draw(st.booleans()):
        cache = with_window(cache, draw(st.integers(1, tokens)))
    sets = 1 if draw(st.booleans()) else 6
    order = torch.rand(
        sets, tokens, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ).argsort(1)
    ends = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=4)))
    pieces = [
        order[:, begin:end].sort(1).values for begin, end in zip([0, *ends], [*ends, tokens], strict=True)
    ]
    return cache, [piece[0] if sets == 1 else piece.reshape(3, 2, -1) for piece in pieces]


@given(cuts())
def test_any_cut_into_segments_makes_the_whole_cache(cut):
    cache, pieces = cut
    plans = [
        SegmentPlan.of(cache, RAW, piece, first=number == 0, rest=0 < number == len(pieces) - 1)
        for number, piece in enumerate(pieces)
    ]
    segments = [encode(plan) for plan in plans]
    assert same(restored(segments, cache.shape, nothing_known), cache)


@given(cuts())
def test_after_each_segment_the_cache_is_that_of_the_positions_so_far(cut):
    cache, pieces = cut
    if any(layer.sliding for layer in cache.layers):
        return
    builder = Builder(cache.shape, nothing_known)
    arrived = None
    for piece in pieces:
        segment = encode(SegmentPlan.of(cache, RAW, piece))
        before = builder.cache
        builder.open(segment.header)
        for place, group in zip(groups_of(segment.header, cache.shape), segment.groups, strict=True):
            builder.add(place, group)
            assert (before is None) is (builder.cache is None), "nothing counts before its segment has closed"
        builder.close()
        arrived = piece if arrived is None else torch.cat((arrived, piece), -1).sort(-1).values
        assert builder.cache is not None
        assert same(builder.cache, cache.select(arrived))


def test_a_refinement_makes_positions_finer_and_leaves_the_others_and_what_was_handed_out():
    cache = make_cache(2, 2, 20, 8)
    builder = Builder(cache.shape, nothing_known)
    for place, group in zip(*_open(builder, encode(SegmentPlan.of(cache, INT2))), strict=True):
        builder.add(place, group)
    builder.close()
    coarse = builder.cache
    kept = [layer.keys.clone() for layer in coarse.layers]
    finer = torch.tensor([1, 7, 19])
    for place, group in zip(*_open(builder, refinement(cache.select(finer), RAW)), strict=True):
        builder.add(place, group)
    builder.close()
    others = torch.tensor([i for i in range(20) if i not in finer.tolist()])
    for layer, before, own in zip(builder.cache.layers, coarse.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys[:, finer], own.keys[:, finer])
        assert torch.equal(layer.values[:, others], before.values[:, others])
    assert all(torch.equal(a, b.keys) for a, b in zip(kept, coarse.layers, strict=True))


def _open(builder: Builder, segment: Segment):
    builder.open(segment.header)
    return groups_of(segment.header, builder.shape), segment.groups


def test_a_position_that_comes_twice_is_refused():
    cache = make_cache()
    both = [encode(SegmentPlan.of(cache, RAW, torch.tensor(piece))) for piece in ([0, 1, 2], [2, 3])]
    with pytest.raises(CodecError, match="a position comes in two segments"):
        restored(both, cache.shape, nothing_known)


def test_a_refinement_of_what_is_not_there_is_refused():
    cache = make_cache()
    segments = [
        encode(SegmentPlan.of(cache, RAW, torch.tensor([0, 1, 2]))),
        refinement(cache.select(torch.tensor([2, 3])), RAW),
    ]
    with pytest.raises(CodecError, match="a position that is not there"):
        restored(segments, cache.shape, nothing_known)
