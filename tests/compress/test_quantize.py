"""The quantizer's laws: error at most half a stored step, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlink.codecs import Quantizer
from kvlink.compress.codecs.quantized import dequantize, pack_bits, quantize, unpack_bits
from kvlink.errors import CodecError

BITS = (8, 4, 3, 2, 1)


@st.composite
def cases(draw):
    """A quantizer and a tensor: shapes from 1 token and odd head sizes, outliers to 1e4."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 7, 16, 33, 80])))
    group = draw(st.sampled_from([2, 5, 32, 64]))
    quantizer = Quantizer(
        draw(st.sampled_from(BITS)), draw(st.sampled_from(["token", "channel"])), group, draw(st.booleans())
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-9, 1e-3, 1.0, 300.0]))
    x = x + draw(st.sampled_from([0.0, 50.0, -3.0]))
    if draw(st.booleans()):
        x[0, 0, 0] = draw(st.sampled_from([1e4, -1e4]))
    if draw(st.booleans()):
        x[-1] = 0.0
    return quantizer, x


def steps(scales: bytes, width: int, x: torch.Tensor, q: Quantizer) -> torch.Tensor:
    """The stored step of each number, spread to the tensor's shape."""
    heads, rows, columns = x.shape
    lines, length = (rows, columns) if q.axis == "token" else (columns, rows)
    groups = -(-length // q.group)
    numbers = np.frombuffer(scales, "<f2" if width == 2 else "<f4").astype(np.float32)
    first = torch.from_numpy(numbers)[: heads * lines * groups].reshape(heads, lines, groups)
    spread = first.repeat_interleave(q.group, -1)[..., :length]
    return spread if q.axis == "token" else spread.transpose(1, 2)


@given(cases())
def test_the_error_is_at_most_half_a_stored_step(case):
    q, x = case
    scales, codes, width = quantize(x, q)
    out = dequantize(scales, codes, width, x.shape, q)
    assert torch.isfinite(out).all()
    if q.bits == 1:
        return
    half = steps(scales, width, x, q) / 2
    # float32 arithmetic on minimum + scale · code rounds in the last bits of the largest number.
    slack = 4e-7 * (x.abs() + 2**q.bits * 2 * half)
    assert ((x - out).abs() <= half * (1 + 1e-5) + slack).all()


@given(cases())
def test_one_bit_is_sign_times_mean_magnitude_around_the_mean(case):
    q, x = case
    if q.axis == "channel":
        q = Quantizer(1, "channel", 65536, q.symmetric)
        mean = x.mean(1, keepdim=True) * (not q.symmetric)
        magnitude = (x - mean).abs().mean(1, keepdim=True)
    else:
        q = Quantizer(1, "token", 65536, q.symmetric)
        mean = x.mean(2, keepdim=True) * (not q.symmetric)
        magnitude = (x - mean).abs().mean(2, keepdim=True)
    scales, codes, width = quantize(x, q)
    out = dequantize(scales, codes, width, x.shape, q)
    distance = ((out - mean).abs() - magnitude).abs()
    assert (distance <= 2e-3 * (magnitude + mean.abs()) + 1e-6).all()


@given(cases())
def test_sizes_are_known_before_the_bytes(case):
    q, x = case
    scales, codes, width = quantize(x, q)
    assert q.part_sizes(tuple(x.shape), 2, width) == [("scales", len(scales)), ("codes", len(codes))]


@given(st.sampled_from(BITS), st.integers(0, 100), st.integers(0, 10**6))
def test_bit_streams_round_trip(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-count // 8) * bits
    assert np.array_equal(unpack_bits(packed, bits, count), codes)


def test_a_bit_stream_is_little_endian():
    assert pack_bits(np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8), 4) == bytes([0x21, 0x43, 0x65, 0x07])
    assert pack_bits(np.array([1, 0, 0, 0, 0, 0, 0, 1], np.uint8), 1) == bytes([0x81])
    assert pack_bits(np.array([7, 0, 1], np.uint8), 3) == bytes([0b01000111, 0, 0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cache_dtype_does_not_matter(bits, dtype):
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    q = Quantizer(bits, "channel", 4)
    assert quantize(x, q) == quantize(x.float(), q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(bad):
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = bad
    with pytest.raises(CodecError, match="head 1, row 2, channel 3 is not finite"):
        quantize(x, Quantizer(8))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_magnitudes_use_wide_scales_and_stay_finite(scale, symmetric):
    x = torch.tensor([[[-1.0, -0.5, 0.5, 1.0]]]) * scale
    scales, codes, width = quantize(x, Quantizer(8, "token", 64, symmetric))
    assert width == 4
    out = dequantize(scales, codes, width, (1, 1, 4), Quantizer(8, "token", 64, symmetric))
    assert torch.allclose(out / scale, x / scale, atol=5e-3)


@pytest.mark.parametrize(
    ("scales", "codes", "message"),
    [
        (b"\0" * 6, b"\0" * 8, "expected 4 scales, found 3"),
        (b"\0" * 8, b"\0" * 4, "expected 8 codes, found 4"),
        (b"\xff\x7f" * 4, b"\0" * 8, "not finite"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(scales, codes, message):
    with pytest.raises(CodecError, match=message):
        dequantize(scales, codes, 2, (1, 2, 4), Quantizer(8))
