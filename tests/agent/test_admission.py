"""A full agent lets callers wait their turn, fairly, and says when to come again."""

from __future__ import annotations

import asyncio

import pytest

from kvlink.agent.admission import Gate
from kvlink.errors import BusyError
from tests.limits import HANGS_S


async def test_a_free_place_is_given_at_once():
    gate = Gate("jobs", 2)
    with await gate.enter("a"), await gate.enter("b"):
        assert gate.inside == 2
    assert gate.inside == 0


async def test_who_finds_no_place_waits_for_one():
    gate = Gate("jobs", 1)
    first = await gate.enter("a")
    second = asyncio.create_task(gate.enter("b"))
    await asyncio.sleep(0.01)
    assert not second.done()
    assert gate.queued == 1
    first.leave()
    (await second).leave()
    assert gate.inside == gate.queued == 0


async def test_peers_take_turns_however_many_calls_each_has():
    gate = Gate("jobs", 1)
    first = await gate.enter("busy")
    order: list[str] = []

    async def work(who: str) -> None:
        with await gate.enter(who):
            order.append(who)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work("busy")) for _ in range(4)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(work("rare")))
    await asyncio.sleep(0)
    first.leave()
    await asyncio.gather(*tasks)
    assert order == ["busy", "rare", "busy", "busy", "busy"]


async def test_one_peer_cannot_take_all_places():
    gate = Gate("jobs", 3, places_each=2)
    held = [await gate.enter("a"), await gate.enter("a")]
    third = asyncio.create_task(gate.enter("a"))
    await asyncio.sleep(0.01)
    assert not third.done()
    with await gate.enter("b"):
        pass
    held[0].leave()
    (await third).leave()


async def test_beyond_the_queue_a_caller_is_told_when_to_come_again():
    gate = Gate("jobs", 1, waiting=1, wait_s=5)
    first = await gate.enter()
    waits = asyncio.create_task(gate.enter())
    await asyncio.sleep(0.01)
    with pytest.raises(BusyError, match="at most 1 jobs at a time, 1 of one peer, 1 wait") as caught:
        await gate.enter()
    assert caught.value.retryable
    assert 0 < caught.value.retry_after_s <= 5
    first.leave()
    (await waits).leave()


async def test_nobody_waits_for_ever():
    gate = Gate("jobs", 1, wait_s=0.05)
    first = await gate.enter()
    with pytest.raises(BusyError):
        await gate.enter()
    assert gate.queued == 0
    first.leave()
    first.leave()  # once is enough, twice is harmless
    assert gate.inside == 0


async def test_who_gives_up_waiting_takes_no_place():
    gate = Gate("jobs", 1)
    first = await gate.enter()
    waiting = asyncio.create_task(gate.enter())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.leave()
    with await asyncio.wait_for(gate.enter(), HANGS_S):
        assert gate.inside == 1


async def test_one_peer_has_half_of_the_places_and_of_the_queue_unless_told_otherwise():
    gate = Gate("jobs", 4, waiting=4)
    held = [await gate.enter("greedy"), await gate.enter("greedy")]
    waiting = [asyncio.create_task(gate.enter("greedy")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match="2 of one peer"):
        await gate.enter("greedy")
    with await gate.enter("honest"), await gate.enter("honest"):
        assert gate.inside == 4
    for ticket in held:
        ticket.leave()
    for task in waiting:
        (await task).leave()


async def test_a_full_queue_makes_way_for_who_waits_less():
    gate = Gate("jobs", 1, waiting=4)
    first = await gate.enter("one")
    done: list[str] = []

    async def work(who: str) -> None:
        with await gate.enter(who):
            done.append(who)

    others = [asyncio.create_task(work(who)) for who in ("one", "one", "two", "two")]
    await asyncio.sleep(0)
    honest = asyncio.create_task(work("honest"))
    (sent_away,), _ = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
    assert isinstance(sent_away.exception(), BusyError)
    assert gate.queued == 4
    first.leave()
    await asyncio.gather(honest, *(task for task in others if task is not sent_away))
    assert done.index("honest") <= 2, "one of each peer in turn"
    assert gate.inside == gate.queued == 0
