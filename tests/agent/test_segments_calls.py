"""Segments between processes: a background tier, a refinement, a second question, the next turn, a handle redeemed.

Both agents are processes with the embedded model; what the sender answers itself is the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from kvlink.errors import AccessError, NotFoundError
from kvlink.eval.items import Item
from kvlink.eval.questions import load_items
from kvlink.transport.api import Ask, Delivery, Progress
from kvlink.transport.client import ReceiverClient, SenderClient
from tests.command import listening, start

TIERS = "q2c+draft@0.25 transform=0.5 rest=2"
CHOSEN = "q2c+draft@0.25 int8"


@dataclass(frozen=True)
class Addresses:
    sender: str
    receiver: str


@pytest.fixture(scope="module")
def agents() -> Iterator[Addresses]:
    processes = [start(kind, "--listen", "127.0.0.1:0") for kind in ("sender", "receiver")]
    try:
        yield Addresses(*map(listening, processes))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def item() -> Item:
    """An item whose first and unrelated question the embedded model answers rightly."""
    return load_items("generated", 3, 7)[0]


async def deliver(agents: Addresses, delivery: Delivery) -> Progress:
    last = None
    async with SenderClient(agents.sender) as source:
        async for progress in source.deliver(replace(delivery, receiver=agents.receiver, answer_here=True)):
            last = progress
    assert last is not None
    return last


async def ask(agents: Addresses, ask: Ask) -> tuple[str, str]:
    """The answer, and the id of the cache that it came from."""
    async with ReceiverClient(agents.receiver) as target:
        pieces = [piece async for piece in target.generate(ask)]
    return "".join(piece.text for piece in pieces).strip(), pieces[-1].cache_id


async def publish(agents: Addresses, text: str, extends: str = "") -> str:
    async with SenderClient(agents.sender) as source:
        return (await source.publish(text, extends=extends)).context_id


def digest(done: Progress) -> bytes:
    return bytes.fromhex(done.receipt.cache_digest)


async def test_two_segments_a_refinement_and_an_answer_from_each(agents, item):
    other = item.query("unrelated").question
    context = await publish(agents, item.context)
    first = await deliver(agents, Delivery("", item.question, TIERS, context_id=context))
    assert first.receipt.segments == 2
    assert first.receipt.kept_share == 1
    assert (await ask(agents, Ask(first.cache_id, item.question)))[0] == first.sender_answer
    second = await deliver(agents, Delivery("", other, TIERS, context_id=context, base_digest=digest(first)))
    assert second.receipt.segments == 1
    assert second.receipt.wire_bytes < 0.45 * first.receipt.wire_bytes
    assert (await ask(agents, Ask(second.cache_id, other)))[0] == second.sender_answer
    assert (await ask(agents, Ask(second.cache_id, item.question)))[0] == first.sender_answer


async def test_a_second_question_then_a_next_turn(agents, item):
    other = item.query("unrelated").question
    context = await publish(agents, item.context)
    first = await deliver(agents, Delivery("", item.question, CHOSEN, context_id=context))
    second = await deliver(agents, Delivery("", other, CHOSEN, context_id=context, base_digest=digest(first)))
    assert second.receipt.wire_bytes < 0.7 * first.receipt.wire_bytes
    assert (await ask(agents, Ask(second.cache_id, other)))[0] == second.sender_answer
    longer = await publish(agents, "Tor Welan was born in Haskel.", extends=context)
    asked = "Where was Tor Welan born?"
    third = await deliver(agents, Delivery("", asked, CHOSEN, context_id=longer, base_digest=digest(second)))
    assert third.receipt.wire_bytes < 0.7 * first.receipt.wire_bytes
    assert (await ask(agents, Ask(third.cache_id, asked)))[0] == third.sender_answer


async def test_a_next_turn_over_all_positions_moves_the_new_tokens_only(agents, item):
    context = await publish(agents, item.context)
    first = await deliver(agents, Delivery("", item.question, "int8", context_id=context))
    longer = await publish(agents, "Tor Welan was born in Haskel.", extends=context)
    asked = "Where was Tor Welan born?"
    turn = await deliver(agents, Delivery("", asked, "int8", context_id=longer, base_digest=digest(first)))
    new = turn.receipt.context_tokens - first.receipt.context_tokens
    share = new / turn.receipt.context_tokens
    assert turn.receipt.wire_bytes < 2 * share * first.receipt.wire_bytes
    assert (await ask(agents, Ask(turn.cache_id, asked)))[0] == turn.sender_answer


async def test_a_base_that_is_not_there_any_more_is_said(agents, item):
    context = await publish(agents, item.context)
    first = await deliver(agents, Delivery("", item.question, CHOSEN, context_id=context))
    async with ReceiverClient(agents.receiver) as target:
        await target.delete_cache(first.cache_id)
    with pytest.raises(NotFoundError, match="send all of it"):
        other = item.query("unrelated").question
        await deliver(agents, Delivery("", other, CHOSEN, context_id=context, base_digest=digest(first)))


async def test_a_handle_is_redeemed_by_the_receiver(agents, item):
    other = item.query("unrelated").question
    handle = f"kvlink://{agents.sender}/{await publish(agents, item.context)}"
    own = await deliver(agents, Delivery("", item.question, "int8", text=item.context))
    text, first = await ask(agents, Ask("", item.question, handle=handle, recipe=CHOSEN))
    assert text == own.sender_answer
    _, second = await ask(agents, Ask("", other, handle=handle, recipe=CHOSEN))
    assert second != first
    again, third = await ask(agents, Ask("", item.question, handle=handle, recipe=CHOSEN))
    assert (again, third) == (text, second), "what was added serves both questions"
    with pytest.raises(AccessError, match="peer list"):
        await ask(agents, Ask("", other, handle="kvlink://192.0.2.1:50051/x"))
