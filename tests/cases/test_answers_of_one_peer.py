"""One client asked for 120 long answers at a time: every other one was refused, again and again."""

from __future__ import annotations

from kvlink.v1 import receiver_pb2
from tests.cases.peer import ANSWER, QUESTION, ended
from tests.forging import forged

WAITED_S = 15.0


def test_another_client_is_answered_all_the_same(network, source, anna, honest):
    mallory = network.caller("mallory", network.receiver)
    cache_id = source.push(forged(honest()), ["anna", "mallory"]).cache_id
    assert anna.answer(cache_id) == ANSWER
    calls = [
        mallory.start("Generate", [
            receiver_pb2.GenerateRequest(
                cache_id=cache_id, question=QUESTION, max_new_tokens=1024, temperature=10.0, seed=seed
            )
        ])
        for seed in range(120)
    ]  # fmt: skip
    ended(lambda: next(calls[0]))  # they are being answered
    for _ in range(2):
        assert ended(lambda: anna.answer(cache_id, WAITED_S)) == ("OK", ANSWER)
    for call in calls:
        call.cancel()
