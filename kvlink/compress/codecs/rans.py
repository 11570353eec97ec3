"""Entropy coding of integers by an asymmetric numeral system with static tables.

Every symbol has a class: 4 · log2 of how widely it is spread. The table of a class is a discrete
logistic distribution with probabilities in units of 2⁻²⁰, the same on every machine; no table
travels. What lies outside a table is escaped, never clipped.

The coder is `constriction` (Bamler, arXiv 2201.01741); tables and escapes are ours.
Does not know: what the integers mean. Place on the path: last in the transform codec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np

from kvlink.errors import CodecError

LOWEST, HIGHEST = -20, 36
"""Classes outside are treated as the nearest: spreads of 1/32 and 512 steps."""

_UNITS = 1 << 20
_TAIL = 16.0  # of the logistic's scale: beyond it everything is escaped
_MOST = (1 << 31) - 1
_HALF_WORD = 1 << 16


@dataclass(frozen=True, slots=True)
class Table:
    """Symbols −reach … reach, then the escape. `counts` `[2 · reach + 2]`: units of probability."""

    reach: int
    counts: np.ndarray
    model: Any


@cache
def table(number: int) -> Table:
    """The table of class `number`."""
    scale = 2 ** (number / 4) * math.sqrt(3) / math.pi
    reach = max(1, math.ceil(_TAIL * scale))
    edges = (np.arange(-reach, reach + 2) - 0.5) / scale
    share = np.diff(1 / (1 + np.exp(-edges)))
    counts = np.maximum(1, np.rint(share * (_UNITS - 4 * (2 * reach + 2)))).astype(np.int64)
    counts = np.append(counts, 2)
    counts[reach] += _UNITS - counts.sum()  # what rounding left over goes to zero, the likeliest
    model = constriction.stream.model.Categorical(counts / _UNITS, perfect=False)
    return Table(reach, counts, model)


def encode(symbols: np.ndarray, classes: np.ndarray) -> bytes:
    """Bytes of `symbols` (any integers within 32 bits), each of its class; both of one length."""
    if symbols.size and int(np.abs(symbols).max()) > _MOST:
        raise CodecError(f"a step is too fine: a coefficient of {int(np.abs(symbols).max())} steps")
    coder = constriction.stream.stack.AnsCoder()
    for number, places in reversed(_groups(classes)):
        found, known = symbols[places], table(number)
        index = (found + known.reach).astype(np.int32)
        outside = np.abs(found) > known.reach
        if outside.any():
            index[outside] = 2 * known.reach + 1
            words = _zigzag(found[outside].astype(np.int64))
            halves = np.stack([words >> 16, words & (_HALF_WORD - 1)], 1).reshape(-1).astype(np.int32)
            coder.encode_reverse(halves, _half_word())
        coder.encode_reverse(index, known.model)
    return bytes(np.asarray(coder.get_compressed(), "<u4").tobytes())


def decode(data: bytes, classes: np.ndarray) -> np.ndarray:
    """The symbols, int64, for the same classes. Raises CodecError where the bytes do not end with them."""
    if len(data) % 4:
        raise CodecError(f"entropy-coded bytes come in words of 4, found {len(data)}")
    out = np.zeros(classes.size, np.int64)
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))
        for number, places in _groups(classes):
            known = table(number)
            found = np.asarray(coder.decode(known.model, len(places)), np.int64) - known.reach
            outside = found > known.reach
            count = int(outside.sum())
            if count:
                halves = np.asarray(coder.decode(_half_word(), 2 * count), np.int64).reshape(-1, 2)
                found[outside] = _unzigzag(halves[:, 0] << 16 | halves[:, 1])
            out[places] = found
        rest = coder.is_empty()
    except (ValueError, IndexError, OverflowError, AssertionError) as error:
        raise CodecError(f"entropy-coded bytes are damaged: {error}") from error
    if not rest:
        raise CodecError("entropy-coded bytes do not end where their symbols do")
    return out


def clip_classes(classes: np.ndarray) -> np.ndarray:
    """Classes that have a table."""
    return np.clip(classes, LOWEST, HIGHEST)


def _groups(classes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(class, places of its symbols in order), classes ascending."""
    if not classes.size:
        return []
    order = np.argsort(classes, kind="stable")
    numbers, starts = np.unique(classes[order], return_index=True)
    return [(int(n), places) for n, places in zip(numbers, np.split(order, starts[1:]), strict=True)]


@lru_cache(maxsize=1)
def _half_word() -> Any:
    return constriction.stream.model.Uniform(_HALF_WORD)


def _zigzag(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0, -2 * values - 1, 2 * values)


def _unzigzag(words: np.ndarray) -> np.ndarray:
    return np.where(words & 1, -(words >> 1) - 1, words >> 1)
