"""Both agents as processes, started once for all cases, with the embedded model and their own defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvlink.agent.sender import Sender
from kvlink.transport import certs
from kvlink.transport.certs import Member
from kvlink.transport.credentials import Credentials
from tests.cases.peer import QUESTION, TEXT, Beside, Peer
from tests.command import free_address, listening
from tests.fuzz.agents import Agent, begin


class Network:
    """A receiver and a sender that ask for credentials, and the others that have some: `evil` is a sender too,
    `liar` a receiver that nobody has started, `anna` and `mallory` are clients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "network"
        at = {name: free_address() for name in ("receiver", "sender", "evil", "liar")}
        self.liar_at = at["liar"]
        members = [Member(name, "receiver", at[name]) for name in ("receiver", "liar")]
        members += [Member(name, "sender", at[name]) for name in ("sender", "evil")]
        certs.begin(self._folder, [*members, *(Member(name, "client") for name in ("anna", "mallory"))])
        self.receiver, self.sender = (
            begin(kind, at[kind], folder / f"{kind}.log", "--credentials", str(self._folder / kind))
            for kind in ("receiver", "sender")
        )
        self._callers: dict[tuple[str, str], Peer] = {}

    def credentials(self, name: str) -> Credentials:
        return Credentials(self._folder / name)

    def caller(self, name: str, agent: Agent) -> Peer:
        key = name, agent.kind
        if key not in self._callers:
            self._callers[key] = Peer(agent, self.credentials(name))
        return self._callers[key]

    def beside(self, agent: Agent) -> Beside:
        """What mallory notices of what others do to an agent."""
        return Beside(agent, self.caller("mallory", agent))

    def stop(self) -> list[str]:
        """What was wrong about how the agents ended."""
        for caller in self._callers.values():
            caller.close()
        return [trouble for agent in (self.receiver, self.sender) if (trouble := agent.stop())]


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Iterator[Network]:
    started = Network(tmp_path_factory.mktemp("cases"))
    try:
        for agent in (started.receiver, started.sender):
            listening(agent.process)
        yield started
    finally:
        assert started.stop() == []


@pytest.fixture
def source(network) -> Peer:
    """A sender, at the receiver. What it pushes may be read by whom it names."""
    return network.caller("sender", network.receiver)


@pytest.fixture
def anna(network) -> Peer:
    """A client, at the receiver."""
    return network.caller("anna", network.receiver)


@pytest.fixture(scope="session")
def honest(tiny) -> Callable[..., list[bytes]]:
    """`honest(recipe, text)`: the frames of an honest transfer of the embedded model."""
    reads = Sender(tiny)

    def frames(recipe: str = "int8", text: str = TEXT) -> list[bytes]:
        return list(reads.pack(reads.read(text), QUESTION, recipe).frames)

    return frames
