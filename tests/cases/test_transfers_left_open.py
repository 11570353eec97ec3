"""A sender began 32 transfers and hung up: for two minutes every other sender was refused."""

from __future__ import annotations

import queue

from kvlink.v1 import receiver_pb2
from tests.cases.peer import ended
from tests.forging import forged

WAITED_S = 15.0


def test_another_senders_transfer_is_taken_all_the_same(network, source, honest):
    evil = network.caller("evil", network.receiver)
    frames = honest()
    source.push(forged(frames), ["anna"])
    calls = []
    for _ in range(32):
        asked: queue.Queue[receiver_pb2.PushCacheRequest | None] = queue.Queue()
        asked.put(receiver_pb2.PushCacheRequest(frame=forged(frames)[0]))
        calls.append(evil.start("PushCache", iter(asked.get, None)))
    taken = [ended(lambda call=call: next(call))[0] for call in calls]
    assert "OK" in taken

    assert ended(lambda: source.push(forged(frames), ["anna"], WAITED_S))[0] == "OK", "while they are open"
    for call in calls:
        call.cancel()
    assert ended(lambda: source.push(forged(frames), ["anna"], WAITED_S))[0] == "OK", "when it has hung up"
