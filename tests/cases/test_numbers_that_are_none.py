"""A raw cache of NaN or infinities, damaged or made so: the receiver said COMPLETE, and every answer was nonsense."""

from __future__ import annotations

import pytest

from tests.cases.peer import ANSWER, ended
from tests.forging import forged

WRONG = {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "-inf": b"\x80\xff"}  # bfloat16, little endian


def middle(data: bytes, number: bytes) -> bytes:
    at = len(data) // 4 * 2
    return data[:at] + number + data[at + 2 :]


@pytest.mark.parametrize("name", WRONG)
def test_a_cache_with_a_number_that_is_none_is_data_loss(source, honest, name):
    raw, number = honest("raw"), WRONG[name]
    for body in (lambda data: number * (len(data) // 2), lambda data: middle(data, number)):
        status, why = ended(lambda body=body: source.push(forged(raw, body=body)))
        assert status == "DATA_LOSS", why


def test_the_same_cache_framed_anew_is_answered_from(source, anna, honest):
    assert anna.answer(source.push(forged(honest("raw")), ["anna"]).cache_id) == ANSWER
