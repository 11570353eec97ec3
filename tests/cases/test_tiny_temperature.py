"""A temperature of 1e-320: logits divided by it are infinite, and the call died with an internal error."""

from __future__ import annotations

import math

import pytest

from tests.cases.peer import ANSWER, ended
from tests.forging import forged


@pytest.fixture
def cache_id(source, honest) -> str:
    return source.push(forged(honest()), ["anna"]).cache_id


def test_a_tiny_temperature_is_greedy_or_input(network, anna, cache_id):
    before = network.receiver.said()
    assert anna.answer(cache_id) == ANSWER
    for temperature in (1e-320, 5e-324, 1e-45, 1e-30, 1e-3):
        status, told = ended(lambda t=temperature: anna.answer(cache_id, temperature=t))
        assert (status, told) == ("OK", ANSWER) or status == "INVALID_ARGUMENT", (temperature, status, told)
    assert "Traceback" not in network.receiver.said()[len(before) :]


@pytest.mark.parametrize("temperature", [math.nan, -1.0, math.inf])
def test_what_is_no_temperature_is_input(anna, cache_id, temperature):
    assert ended(lambda: anna.answer(cache_id, temperature=temperature))[0] == "INVALID_ARGUMENT"
