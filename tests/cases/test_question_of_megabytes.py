"""A question of 19 MB for a held cache: a receiver cut all of it into tokens before it looked at its window."""

from __future__ import annotations

import pytest

from kvlink.v1 import receiver_pb2
from tests.cases.peer import ANSWER, ended
from tests.forging import forged


@pytest.mark.parametrize("times", [900_000, 700_000])
def test_a_question_beyond_the_window_is_refused_by_its_length(network, source, anna, honest, times):
    held = source.push(forged(honest()), ["anna"]).cache_id
    assert anna.answer(held) == ANSWER  # everything is loaded
    request = receiver_pb2.GenerateRequest(cache_id=held, question="Jand Faris was born. " * times)
    with network.beside(network.receiver) as others:
        status, why = ended(lambda: anna.call("Generate", request))
    assert status in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), why
    others.require_unmoved()
