"""A question of 19 MB for a held cache: the receiver cut all of it into tokens before it looked at its window."""

from __future__ import annotations

from kvlink.v1 import receiver_pb2
from tests.cases.peer import ANSWER, ended
from tests.forging import forged


def test_a_question_beyond_the_window_is_refused_by_its_length(network, source, anna, honest):
    held = source.push(forged(honest()), ["anna"]).cache_id
    assert anna.answer(held) == ANSWER  # everything is loaded
    request = receiver_pb2.GenerateRequest(cache_id=held, question="Jand Faris was born. " * 900_000)
    with network.beside(network.receiver) as others:
        status, why = ended(lambda: anna.call("Generate", request))
    assert status in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), why
    others.require_unmoved()
