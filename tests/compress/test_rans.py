"""The entropy coder: any integers come back, in about as many bits as their tables say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvlink.compress.codecs import rans
from kvlink.errors import CodecError

NUMBERS = range(rans.LOWEST, rans.HIGHEST + 1)


@given(
    st.lists(
        st.tuples(st.integers(-(2**31) + 1, 2**31 - 1), st.integers(rans.LOWEST, rans.HIGHEST)), max_size=80
    )
)
def test_any_integers_of_any_class_come_back(pairs):
    symbols = np.array([s for s, _ in pairs], np.int64)
    classes = np.array([c for _, c in pairs], np.int64)
    data = rans.encode(symbols, classes)
    assert (rans.decode(data, classes) == symbols).all()
    assert data == rans.encode(symbols, classes), "the same bytes every time"


@pytest.mark.parametrize("number", [-12, -4, 0, 4, 8, 16, 30])
def test_the_size_is_that_of_the_distribution(number):
    scale = 2 ** (number / 4) * math.sqrt(3) / math.pi
    symbols = np.rint(np.random.default_rng(0).logistic(0, scale, 50_000)).astype(np.int64)
    edges = 1 / (1 + np.exp(-np.clip((np.arange(-40_000, 40_002) - 0.5) / scale, -500, 500)))
    share = np.diff(edges)
    entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
    bits = 8 * len(rans.encode(symbols, np.full(symbols.size, number))) / symbols.size
    assert bits == pytest.approx(entropy, rel=0.03, abs=0.01)


def test_tables_are_whole_and_do_not_hang_on_the_last_bit_of_a_machine():
    for number in NUMBERS:
        table = rans.table(number)
        assert table.counts.min() >= 1
        assert table.counts.sum() == 1 << 20
        assert len(table.counts) == 2 * table.reach + 2
        scale = 2 ** (number / 4) * math.sqrt(3) / math.pi
        edges = (np.arange(-table.reach, table.reach + 2) - 0.5) / scale
        units = np.diff(1 / (1 + np.exp(-edges))) * ((1 << 20) - 4 * (2 * table.reach + 2))
        margin = np.abs(units - np.floor(units) - 0.5).min()
        assert margin > 1e-6, "no count is near a rounding edge, so every machine rounds alike"


def test_tables_are_what_they_always_were():
    total = blake3()
    for number in NUMBERS:
        total.update(rans.table(number).counts.astype("<i8").tobytes())
    assert total.hexdigest(length=8) == "c637f6277f13f100"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x01" * 7, "words of 4"),
        (b"\x00" * 8, "damaged"),
        (b"\xff" * 400, "do not end"),
    ],
)
def test_bytes_that_are_no_code_are_refused(data, message):
    with pytest.raises(CodecError, match=message):
        rans.decode(data, np.zeros(10, np.int64))


@given(st.binary(max_size=200), st.integers(0, 60))
def test_garbage_is_decoded_or_refused_and_nothing_else(data, count):
    classes = np.arange(count) % 50 + rans.LOWEST
    try:
        found = rans.decode(data, classes)
    except CodecError:
        return
    assert found.size == count
    assert np.abs(found).max(initial=0) <= 2**31


def test_more_than_32_bits_are_refused():
    with pytest.raises(CodecError, match="a step is too fine"):
        rans.encode(np.array([2**31]), np.array([0]))
