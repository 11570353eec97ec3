"""A receiver redeems a handle itself: for who may use the context, once for the same question, what is missing only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.errors import (
    AccessError,
    ConfigError,
    IdentityError,
    KvlinkError,
    LimitError,
    NotFoundError,
    RemoteProtocolError,
)
from kvlink.receipt import Spoken
from kvlink.recipe import Target
from kvlink.transport.api import Ask, Caller, Fetch
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server
from tests.agent.conftest import QUESTION, TEXT

OTHER = "Who carried the crates?"


class Agents:
    """Both agents, the receiver with the sender's address in reach, and what was fetched."""

    def __init__(self, lm, settings: ReceiverSettings) -> None:
        self.fetches: list[Fetch] = []
        self.sender = SenderService(Sender(lm), SenderSettings(), dial=to_receivers())
        self.receiver = ReceiverService(Receiver(lm), settings, dial=lambda at, _: SenderClient(at))
        fetch_cache = self.sender.fetch_cache

        def counted(fetch: Fetch, caller: Caller) -> AsyncIterator[bytes]:
            self.fetches.append(fetch)
            return fetch_cache(fetch, caller)

        self.sender.fetch_cache = counted  # type: ignore[method-assign, assignment]
        self.servers = [
            Server("127.0.0.1:0", receiver=self.receiver),
            Server("127.0.0.1:0", sender=self.sender),
        ]

    async def __aenter__(self) -> Agents:
        self.ports = [await server.start() for server in self.servers]
        self.target = await ReceiverClient(f"127.0.0.1:{self.ports[0]}").__aenter__()
        self.source = await SenderClient(f"127.0.0.1:{self.ports[1]}").__aenter__()
        self.published = await self.source.publish(TEXT)
        self.handle = f"kvlink://127.0.0.1:{self.ports[1]}/{self.published.context_id}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.target.__aexit__(None, None, None)
        await self.source.__aexit__(None, None, None)
        for server in self.servers:
            await server.stop(0)

    async def ask(self, question: str, recipe: str = "", handle: str = "", **target) -> tuple[str, str]:
        """The answer, and the cache that it came from."""
        ask = Ask("", question, 8, handle=handle or self.handle, recipe=recipe, target=Target(**target))
        pieces = [piece async for piece in self.target.generate(ask)]
        return "".join(piece.text for piece in pieces), pieces[-1].cache_id


@pytest.fixture
async def agents(random_lm) -> AsyncIterator[Agents]:
    async with Agents(random_lm("qwen2", "bfloat16"), ReceiverSettings(default_recipe="int8")) as found:
        yield found


async def test_a_handle_is_redeemed_and_the_answer_is_the_one_from_a_delivery(agents):
    text, cache_id = await agents.ask(QUESTION)
    transfer = agents.sender._sender.pack(agents.sender._sender.read(TEXT), QUESTION, "int8")
    held = agents.receiver._receiver.receive(transfer.frames)
    assert text.strip() == agents.receiver._receiver.answer(held, QUESTION, max_new_tokens=8).text
    assert [piece async for piece in agents.target.generate(Ask(cache_id, OTHER, 2))], "the cache has an id"


async def test_a_cache_of_all_positions_serves_every_question(agents):
    _, first = await agents.ask(QUESTION)
    _, second = await agents.ask(OTHER)
    assert first == second
    assert len(agents.fetches) == 1


async def test_simultaneous_askers_wait_for_one_pull(agents):
    found = await asyncio.gather(*(agents.ask(QUESTION, "q2c@0.3 int8") for _ in range(4)))
    assert len(set(found)) == 1
    assert len(agents.fetches) == 1


async def test_a_later_question_pulls_what_is_missing(agents):
    await agents.ask(QUESTION, "q2c@0.3 int8")
    first = agents.receiver.store.held_bytes
    _, cache_id = await agents.ask(OTHER, "q2c@0.3 int8")
    _, again = await agents.ask(QUESTION, "q2c@0.3 int8")
    assert [bool(fetch.base_digest) for fetch in agents.fetches] == [False, True]
    assert again == cache_id, "which has what the first question needed too"
    held = agents.receiver.store.get(cache_id)
    assert held.receipt.kept_share > 0.3
    assert agents.receiver.store.held_bytes > first


async def test_recipe_and_target_of_the_request_are_the_transfers(agents):
    await agents.ask(QUESTION, "q2c@0.5 int4", budget_bytes=9000)
    (fetch,) = agents.fetches
    assert (fetch.recipe, fetch.target) == ("q2c@0.5 int4", Target(budget_bytes=9000))
    with pytest.raises(LimitError, match="no cache fits"):
        await agents.ask(QUESTION, "q2c@0.5 int4", budget_bytes=50)


async def test_when_the_cache_has_gone_the_handle_is_redeemed_anew(agents):
    _, first = await agents.ask(QUESTION, "q2c@0.3 int8")
    agents.receiver.delete_cache(first)
    _, second = await agents.ask(OTHER, "q2c@0.3 int8")
    assert second != first
    assert not agents.fetches[-1].base_digest


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        ("kvlink://127.0.0.1:{port}/nobody", NotFoundError, "no context with this id"),
        ("kvlink://10.1.2.3:50051/x", AccessError, "peer list"),
        ("http://127.0.0.1:1/x", ConfigError, "expected a handle"),
        ("kvlink://127.0.0.1:0/x", ConfigError, "port 0"),
        ("kvlink://127.0.0.1:{port}/../x", ConfigError, "expected a handle"),
    ],
)
async def test_handles_that_cannot_be_redeemed_say_why(agents, handle, error, message):
    with pytest.raises(KvlinkError, match=message) as caught:
        await agents.ask(QUESTION, handle=handle.format(port=agents.ports[1]))
    assert isinstance(caught.value, error) or error is ConfigError
    assert len(agents.receiver.inbound) == 0


async def test_the_sender_asks_whether_the_asker_may_use_the_context_too(agents):
    """Without credentials all names are empty: here the services' own callers stand for them."""
    sender = agents.sender
    published = await sender.publish(TEXT, 0, [], Caller("anna", readers=("receiver", "bert")))
    for asked_by, allowed in (("anna", True), ("bert", True), ("", True), ("mallory", False)):
        caller = Caller("receiver", asked_by=asked_by)
        frames = sender.fetch_cache(Fetch(published.context_id, QUESTION, "int8"), caller)
        if allowed:
            assert [frame async for frame in frames]
        else:
            with pytest.raises(NotFoundError):
                await anext(frames)


async def test_what_one_caller_has_pulled_is_not_another_ones(agents):
    ask = Ask("", QUESTION, 2, handle=agents.handle)
    hosts = ("10.0.0.1", "10.0.0.1", "10.0.0.2")
    last = [[p async for p in agents.receiver.generate(ask, Caller(host=host))][-1] for host in hosts]
    assert len(agents.fetches) == 2, "callers without a name are their hosts"
    assert last[0].cache_id == last[1].cache_id != last[2].cache_id
    with pytest.raises(NotFoundError):
        agents.receiver.store.get(last[0].cache_id, "mallory")


async def test_a_sender_of_another_model_or_release_is_asked_for_nothing(agents, random_lm, monkeypatch):
    own = agents.sender.capabilities()
    for told, error, words in (
        (replace(own, spoken=Spoken(2, 2)), RemoteProtocolError, "protocol: 1 here, 2 at the peer"),
        (replace(own, dtype="float32"), IdentityError, "dtype: here bfloat16, at the peer float32"),
    ):
        monkeypatch.setattr(agents.sender, "capabilities", lambda told=told: told)
        with pytest.raises(error, match=words):
            await agents.ask(QUESTION, "int8")
    assert not agents.fetches


async def test_a_receiver_that_dials_nobody_says_so(random_lm):
    service = ReceiverService(Receiver(random_lm("qwen2", "bfloat16")))
    with pytest.raises(ConfigError, match="redeems no handles"):
        await anext(service.generate(Ask("", QUESTION, handle="kvlink://127.0.0.1:1/x")))
