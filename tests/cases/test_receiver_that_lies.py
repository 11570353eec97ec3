"""A receiver that took nothing and said COMPLETE, with 50,000 stages of its own in the receipt.

The sender told its caller that the context was there, and showed a metric for each stage, under names that
the receiver chose, for as long as it lived.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.cases.peer import QUESTION, TEXT, ended
from tests.liar import lying

STAGES = {f'x{number}"}} 1\nkvlink_forged 666\n#': 1.0 for number in range(50_000)}
LIES = {"the next frame is 2**62": (2**62, {}), "stages of its own": (1, STAGES)}


@pytest.mark.parametrize("name", LIES)
def test_no_lie_is_believed_or_measured(network, anna, name):
    following, stages = LIES[name]
    (itself,) = anna.call("GetCapabilities", common_pb2.GetCapabilitiesRequest())

    def push(frames: Iterator[Any], _: Any) -> Iterator[receiver_pb2.PushCacheResponse]:
        next(frames)
        yield receiver_pb2.PushCacheResponse(
            state=receiver_pb2.TRANSFER_STATE_ACCEPTED, next_sequence=following
        )
        if stages:
            for _ in frames:
                pass
        told = common_pb2.Receipt(stage_s=stages)
        yield receiver_pb2.PushCacheResponse(
            state=receiver_pb2.TRANSFER_STATE_COMPLETE, cache_id="c", receipt=told
        )

    def metrics() -> bytes:
        with urllib.request.urlopen(f"http://{network.sender.metrics}/metrics") as page:
            return page.read()

    before = len(metrics())
    request = sender_pb2.DeliverCacheRequest(
        text=TEXT, question=QUESTION, recipe="int8", receiver=network.liar_at
    )
    proof = network.credentials("liar")
    with lying(address=network.liar_at, credentials=proof, GetCapabilities=lambda *_: itself, PushCache=push):
        status, why = ended(lambda: network.caller("anna", network.sender).call("DeliverCache", request))
    assert status not in ("OK", "INTERNAL", "UNKNOWN"), why
    assert network.liar_at in why
    assert "forged" not in why
    page = metrics()
    assert b"forged" not in page
    assert len(page) - before < 50_000
