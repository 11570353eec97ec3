"""Deadlines between processes: real agents, and a line that is too slow for all of a transfer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.errors import DeadlineError, TruncatedError
from kvlink.receipt import Receipt
from kvlink.recipe import Target
from kvlink.transport.api import Ask, Delivery, Fetch, Progress
from kvlink.transport.client import ReceiverClient, SenderClient
from tests.agent.conftest import QUESTION, TEXT
from tests.command import listening, start
from tests.relay import Relay, relay

ID = b"0123456789abcdef"
DEADLINE_S = 2.0
NEVER_S, IN_PART_S = 30 * DEADLINE_S, 3 * DEADLINE_S
"""Seconds that the whole transfer takes on a line: too long for the first segment, and for the last one."""


@dataclass
class Agents:
    sender: str
    receiver: str
    model: str
    wire_bytes: int = 0


@pytest.fixture(scope="module")
def processes(checkpoint) -> Iterator[Agents]:
    model = str(checkpoint("qwen2", "bfloat16"))
    started = [start(kind, "--model", model, "--listen", "127.0.0.1:0") for kind in ("sender", "receiver")]
    try:
        yield Agents(listening(started[0]), listening(started[1]), model)
    finally:
        for process in started:
            process.terminate()
            process.wait(20)


@pytest.fixture
async def agents(processes) -> Agents:
    """Warm, and with the size of a whole transfer."""
    if not processes.wire_bytes:
        processes.wire_bytes = (await deliver(processes, processes.receiver)).receipt.wire_bytes
    return processes


async def deliver(agents: Agents, receiver: str, **options) -> Progress:
    async with SenderClient(agents.sender) as source:
        delivery = Delivery(receiver, QUESTION, "raw", text=TEXT, **options)
        return [progress async for progress in source.deliver(delivery)][-1]


@asynccontextmanager
async def line(address: str, agents: Agents, whole_s: float, *, back: bool = False) -> AsyncIterator[Relay]:
    """A line on which the whole transfer takes `whole_s`."""
    rate = {"rate_back_bps" if back else "rate_bps": 8 * agents.wire_bytes / whole_s}
    async with relay(int(address.rpartition(":")[2]), **rate) as wire:
        yield wire


async def answer(agents: Agents, cache_id: str) -> tuple[str, float]:
    """What the receiver answers, and the share of the positions that it says it holds."""
    async with ReceiverClient(agents.receiver) as target:
        pieces = [piece async for piece in target.generate(Ask(cache_id, QUESTION))]
    return "".join(piece.text for piece in pieces), pieces[-1].receipt.kept_share


async def test_what_has_closed_by_the_deadline_is_answered_from(agents):
    hurry = {"target": Target(deadline_s=DEADLINE_S), "delivery_id": ID}
    async with line(agents.receiver, agents, IN_PART_S) as wire:
        done = await deliver(agents, f"127.0.0.1:{wire.port}", **hurry)
        told = done.receipt
        assert 1 <= told.segments < 5
        assert 0 < told.kept_share < 0.9
        assert told.kept_tokens == round(told.kept_share * told.context_tokens)
        text, share = await answer(agents, done.cache_id)
        assert text
        assert share == told.kept_share, "both ends say the same"
        again = await deliver(agents, f"127.0.0.1:{wire.port}", **hurry)
        assert (again.cache_id, again.receipt.segments) == (done.cache_id, told.segments)
        assert again.receipt.socket_bytes < 5_000, "nothing is sent again"


async def test_in_time_it_is_the_whole_cache(agents):
    done = await deliver(agents, agents.receiver, target=Target(deadline_s=3600))
    assert (done.receipt.segments, done.receipt.kept_share) == (5, 1)


@pytest.mark.parametrize("allowed", [False, True])
async def test_with_nothing_closed_the_text_comes_where_it_is_allowed_and_else_an_error(agents, allowed):
    target = Target(deadline_s=DEADLINE_S, allow_text=allowed)
    async with line(agents.receiver, agents, NEVER_S) as wire:
        receiver = f"127.0.0.1:{wire.port}"
        if not allowed:
            with pytest.raises(
                DeadlineError, match=r"has passed: \d+ frames of [\d,]+ bytes came, no segment"
            ):
                await deliver(agents, receiver, target=target)
            return
        done = await deliver(agents, receiver, target=target)
    assert (done.receipt.recipe, done.receipt.kept_share) == ("text", 1)
    assert (await answer(agents, done.cache_id))[0]


class TestFetch:
    @asynccontextmanager
    async def frames(self, agents: Agents, whole_s: float, **target) -> AsyncIterator[list[bytes]]:
        async with line(agents.sender, agents, whole_s, back=True) as wire:
            async with SenderClient(agents.sender) as direct:
                published = await direct.publish(TEXT)
            async with SenderClient(f"127.0.0.1:{wire.port}") as source:
                fetch = Fetch(published.context_id, QUESTION, "raw", Target(deadline_s=DEADLINE_S, **target))
                yield [frame async for frame in source.fetch(fetch)]

    async def test_it_ends_with_the_last_segment_that_closed_in_time(self, agents, random_lm):
        receiver = Receiver(random_lm("qwen2", "bfloat16"))
        async with self.frames(agents, IN_PART_S) as frames:
            with pytest.raises(TruncatedError):
                receiver.receive(frames)
            held = receiver.receive(frames, partial=True)
            assert 0 < held.receipt.kept_share < 0.9
            assert receiver.receive(
                frames[:-1], partial=True
            ).receipt.segments == held.receipt.segments - 1 or (held.receipt.segments == 1)

    async def test_with_nothing_closed_it_is_an_error_or_the_text(self, agents, random_lm):
        with pytest.raises(DeadlineError, match=r"has passed: \d+ frames of [\d,]+ bytes came, no segment"):
            async with self.frames(agents, NEVER_S):
                pass
        async with self.frames(agents, NEVER_S, allow_text=True) as frames:
            held = Receiver(random_lm("qwen2", "bfloat16")).receive(frames)
            assert held.receipt.recipe == "text"


class TestHandle:
    """A receiver that redeems a handle itself looks at its own clock."""

    async def asked(self, agents: Agents, whole_s: float, **target) -> Receipt:
        async with SenderClient(agents.sender) as direct:
            published = await direct.publish(TEXT)
        async with line(agents.sender, agents, whole_s, back=True) as wire:
            ask = Ask(
                "", QUESTION, handle=f"kvlink://127.0.0.1:{wire.port}/{published.context_id}", recipe="raw",
                target=Target(deadline_s=DEADLINE_S, **target),
            )  # fmt: skip
            async with ReceiverClient(agents.receiver) as target_agent:
                pieces = [piece async for piece in target_agent.generate(ask)]
        assert "".join(piece.text for piece in pieces)
        return pieces[-1].receipt

    async def test_it_answers_from_what_has_closed(self, agents):
        told = await self.asked(agents, IN_PART_S)
        assert 0 < told.kept_share < 0.9
        assert 1 <= told.segments < 5

    async def test_with_nothing_closed_from_the_text_where_it_is_allowed(self, agents):
        with pytest.raises(DeadlineError, match="no segment has closed"):
            await self.asked(agents, NEVER_S)
        assert (await self.asked(agents, NEVER_S, allow_text=True)).recipe == "text"
