"""The codec: laws that every recipe keeps, and what a decoder refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.codecs import Transform
from kvlink.compress.lossless import from_planes, pack_part, to_planes, unpack_part
from kvlink.errors import CodecError
from kvlink.payload import Group, Part
from kvlink.recipe import Recipe
from kvlink.wire.layout import groups_of, part_sizes
from tests.compress.test_transform import known
from tests.segments import decoded, encoded, there_and_back
from tests.test_recipe import codecs
from tests.wire.samples import make_cache


@st.composite
def caches(draw):
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    cache = make_cache(
        draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 30)), draw(st.sampled_from([1, 5, 16])),
        draw(st.integers(0, 99)), dtype,
    )  # fmt: skip
    kind = draw(st.sampled_from(["full", "shared", "head"]))
    if kind == "full":
        return cache
    count = draw(st.integers(1, cache.tokens))
    layers, heads = len(cache.layers), cache.layers[0].keys.shape[0]
    order = torch.rand(layers * heads, cache.tokens, generator=torch.Generator().manual_seed(1)).argsort(-1)
    sets = order[:, :count].sort(-1).values
    return cache.select(sets[0] if kind == "shared" else sets.reshape(layers, heads, count))


@given(caches(), codecs(), st.sampled_from(["identity", "zstd"]))
def test_any_codec_on_any_cache_keeps_shape_positions_and_declared_sizes(cache, codec, coder):
    if isinstance(codec, Transform):  # coefficients of a few thousand steps: no finer ones
        codec = replace(codec, step_code=max(codec.step_code, -20), basis="own")
    recipe, shape, context = (
        Recipe(codec=codec, coder=coder),
        cache.shape,
        known(cache.tokens, *cache.layers[0].keys.shape[::2], len(cache.layers)),
    )
    (segment,) = encoded(cache, recipe, context)
    places = groups_of(segment.header, shape)
    for place, group in zip(places, segment.groups, strict=True):
        sizes = part_sizes(place, segment.header, shape, bytes(group.scale_bytes), 0)
        assert [(p.kind, p.plain_bytes) for p in group.parts] == sizes
        assert all(p.coded_bytes <= p.plain_bytes for p in group.parts)
    out = decoded([segment], shape, context)
    assert out.tokens == cache.tokens
    for ours, theirs in zip(out.layers, cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert ours.keys.dtype == theirs.keys.dtype
        assert ours.keys.shape == theirs.keys.shape
        if codec.exact:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


@given(caches())
def test_encoding_is_deterministic(cache):
    recipe = Recipe.parse("int3 svd=4")
    assert encoded(cache, recipe) == encoded(cache, recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", ["raw", "lossless"])
def test_lossless_is_bit_exact_for_every_pattern(dtype, recipe):
    """NaN payloads, infinities, signed zeros and subnormals included."""
    width = dtype.itemsize
    raw = torch.randint(
        0, 256, (2 * 8 * 4 * width,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    tensor = torch.frombuffer(bytearray(raw.numpy().tobytes()), dtype=dtype).reshape(2, 8, 4).clone()
    tensor[0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    cache = KVCache((LayerCache(tensor, tensor.flip(1), full_positions(2, 8)),), 8)
    parsed = Recipe.parse(recipe)
    out = there_and_back(cache, parsed).layers[0]
    assert torch.equal(out.keys.view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert torch.equal(out.values.view(torch.uint8), tensor.flip(1).contiguous().view(torch.uint8))


def test_low_rank_at_full_rank_is_the_matrix_and_less_is_the_best_approximation():
    cache = make_cache(1, 2, 12, 4, dtype=torch.float32)
    full = Recipe.parse("raw svd=64")
    restored = there_and_back(cache, full)
    assert torch.allclose(restored.layers[0].keys, cache.layers[0].keys, atol=1e-5)
    low = Recipe.parse("raw svd=3")
    out = there_and_back(cache, low).layers[0].keys
    matrix = cache.layers[0].keys.transpose(0, 1).reshape(12, 8)
    lost = torch.linalg.svdvals(matrix)[3:].square().sum()
    error = (out.transpose(0, 1).reshape(12, 8) - matrix).square().sum()
    assert torch.allclose(error, lost, rtol=1e-4)


def test_low_rank_counts_the_bytes_of_both_factors():
    cache = make_cache(1, 2, 40, 16)
    (segment,) = encoded(cache, Recipe.parse("int8 svd=8 coder=identity"))
    keys = replace(segment.groups[0], parts=segment.groups[0].parts[:4])
    codes = sum(p.coded_bytes for p in keys.parts if p.kind == "codes")
    assert codes == 40 * 8 + 8 * 32
    assert sum(p.coded_bytes for p in keys.parts if p.kind == "scales") > 0


def test_not_finite_numbers_are_refused_with_layer_and_side():
    cache = make_cache()
    cache.layers[1].values[0, 3, 2] = float("nan")
    with pytest.raises(CodecError, match="layer 1 values: .* head 0, row 3, channel 2"):
        encoded(cache, Recipe.parse("int8"))


def test_sliding_layers_travel_whole():
    full, slid = make_cache(1, tokens=20), make_cache(1, tokens=7, seed=2)
    layer = slid.layers[0]
    cache = KVCache(
        (full.layers[0], LayerCache(layer.keys, layer.values, full_positions(2, 7, 13), True)), 20
    ).select(torch.tensor([0, 4, 19]))
    recipe = Recipe.parse("raw")
    out = there_and_back(cache, recipe)
    assert out.layers[1].sliding
    assert out.layers[1].positions.tolist() == [list(range(13, 20))] * 2
    assert torch.equal(out.layers[1].keys, layer.keys)
    assert out.layers[0].positions.tolist() == [[0, 4, 19]] * 2


def _with_part(segment, number, **change):
    group = segment.groups[1]
    parts = list(group.parts)
    parts[number] = replace(parts[number], **change)
    return _with_group(segment, replace(group, parts=tuple(parts)))


def _with_group(segment, group, at=1):
    return replace(segment, groups=(*segment.groups[:at], group, *segment.groups[at + 1 :]))


def _with_map(segment, data):
    return _with_group(segment, Group((Part("map", "identity", len(data), data),)), 0)


MUTATIONS = {
    "scale width": (
        lambda s: _with_group(s, replace(s.groups[1], scale_bytes=(3, 2))),
        "layer 0 keys: expected 2 or 4 bytes a scale",
    ),
    "a scale width missing": (
        lambda s: _with_group(s, replace(s.groups[1], scale_bytes=(2,))),
        "expected 2 tensors",
    ),
    "a part missing": (
        lambda s: _with_group(s, replace(s.groups[1], parts=s.groups[1].parts[1:])),
        "expected parts",
    ),
    "a part too many": (
        lambda s: _with_group(s, replace(s.groups[1], parts=s.groups[1].parts * 2)),
        "4 parts more",
    ),
    "plain size": (lambda s: _with_part(s, 1, plain_bytes=7), "expected parts"),
    "identity of another size": (
        lambda s: _with_part(s, 1, coder="identity", data=b"x"),
        "expected .* bytes, found 1",
    ),
    "not zstd": (lambda s: _with_part(s, 1, coder="zstd", data=b"garbage"), "not a zstd frame"),
    "map short": (lambda s: _with_map(s, b"\1"), "expected 3 bytes"),
    "map beyond the end": (lambda s: _with_map(s, b"\1\0\xc0"), "at or beyond 22"),
    "map with other counts": (lambda s: _with_map(s, b"\1\0\0"), "expected 3 positions a set"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_segments_that_do_not_fit_are_refused(name):
    mutate, message = MUTATIONS[name]
    cache = make_cache(tokens=22).select(torch.tensor([0, 4, 19]))
    (segment,) = encoded(cache, Recipe.parse("int8"))
    with pytest.raises(CodecError, match=message):
        decoded([mutate(segment)], cache.shape)


def test_a_bomb_is_refused_by_its_declared_size():
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(50_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(CodecError, match="declares 50000000"):
        unpack_part(Part("codes", "zstd", 1000, bomb))


def test_a_frame_that_declares_no_size_is_refused():
    packer = zstandard.ZstdCompressor(level=1, write_content_size=False)
    with pytest.raises(CodecError, match="expected 1000 plain bytes"):
        unpack_part(Part("codes", "zstd", 1000, packer.compress(bytes(1000))))


@given(st.binary(max_size=300), st.sampled_from(["identity", "zstd"]))
def test_parts_round_trip_and_never_grow(data, coder):
    part = pack_part("codes", data, coder)
    assert part.coded_bytes <= len(data)
    assert unpack_part(part) == data


@given(st.binary(max_size=60), st.sampled_from([1, 2, 4]))
def test_byte_planes_round_trip(data, width):
    data = data[: len(data) // width * width]
    assert from_planes(to_planes(data, width), width) == data
