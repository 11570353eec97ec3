"""How an agent stops: calls end, or are told that it stops and when to come again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvlink.agent.threads import to_thread
from kvlink.errors import PeerUnavailableError, StoppingError
from kvlink.transport.api import Ask, Piece
from kvlink.transport.client import ReceiverClient
from kvlink.transport.server import Server


class Receiver:
    """Answers `made` pieces and then does what it is told to."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.begun = asyncio.Event()
        self._then = then

    async def generate(self, ask: Ask, caller: object) -> AsyncIterator[Piece]:
        yield Piece("one", (1,))
        self.begun.set()
        await self._then()  # type: ignore[misc]
        yield Piece("two", (2,))
        yield Piece("", (), True)

    def delete_cache(self, cache_id: str, caller: object) -> None:
        return None


@asynccontextmanager
async def asked(
    then: Callable[[], object],
) -> AsyncIterator[tuple[Server, ReceiverClient, asyncio.Task[list[str]]]]:
    """A server, a client, and a question of it that is being answered."""
    receiver = Receiver(then)
    server = Server("127.0.0.1:0", receiver=receiver)  # type: ignore[arg-type]
    try:
        async with ReceiverClient(f"127.0.0.1:{await server.start()}") as peer:

            async def ask() -> list[str]:
                return [piece.text async for piece in peer.generate(Ask("id", "?"))]

            asking = asyncio.create_task(ask())
            await receiver.begun.wait()
            yield server, peer, asking
            asking.cancel()
    finally:
        await server.stop(0)


async def test_a_call_that_ends_in_time_is_answered():
    go_on = asyncio.Event()
    async with asked(go_on.wait) as (server, _, asking):
        stopping = asyncio.create_task(server.stop(1e6))
        await asyncio.sleep(0)
        go_on.set()
        assert await asking == ["one", "two", ""]
        await stopping


async def test_a_call_that_does_not_is_told_when_to_come_again():
    async with asked(asyncio.Event().wait) as (server, _, asking):
        await server.stop(0.05)
        with pytest.raises(StoppingError, match="the agent is stopping; try again") as caught:
            await asking
        assert caught.value.retry_after_s == 2.0
        assert caught.value.retryable


async def test_a_new_call_is_told_the_same_while_others_end():
    go_on = asyncio.Event()
    async with asked(go_on.wait) as (server, peer, asking):
        stopping = asyncio.create_task(server.stop(1e6))
        with pytest.raises(StoppingError) as caught:
            while True:  # until the server has begun to stop
                await peer.delete_cache("id")
        assert caught.value.retry_after_s > 0
        go_on.set()
        await asking
        await stopping


async def test_a_thread_that_cannot_be_stopped_holds_nobody_up():
    never = threading.Event()
    try:
        async with asked(lambda: to_thread(never.wait)) as (server, _, asking):
            await server.stop(0.05)
            with pytest.raises(StoppingError):
                await asking
    finally:
        never.set()


@pytest.mark.parametrize(("hint_s", "told", "tries"), [(0.01, True, 4), (0.0, True, 1), (0.0, False, 4)])
async def test_who_asks_again_waits_for_as_long_as_it_was_told(hint_s, told, tries):
    """A peer that said so itself is asked again only where it said when."""
    server = Server("127.0.0.1:0", receiver=Receiver(asyncio.Event().wait))  # type: ignore[arg-type]
    made = 0

    async def attempt() -> AsyncIterator[int]:
        nonlocal made
        made += 1
        error = StoppingError(retry_after_s=hint_s) if hint_s else PeerUnavailableError("gone")
        error.reported = told
        raise error
        yield 0

    try:
        async with ReceiverClient(f"127.0.0.1:{await server.start()}") as peer:
            with pytest.raises(PeerUnavailableError):
                async for _ in peer._again(attempt):  # type: ignore[arg-type]
                    pass
        assert made == tries
    finally:
        await server.stop(0)
