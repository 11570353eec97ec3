"""Both agents in this process, on real gRPC over loopback, with a small random model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.errors import TruncatedError
from kvlink.transport.api import Ask, Delivery, Progress, PushStatus
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.link import added_by_grpc
from kvlink.transport.server import Server

TEXT = (
    "The harbour of Lisket lay quiet when the first boats came in. Maret Olsun was born in Tavik, a day's "
    "walk up the coast. The young men who carried the crates knew her stories by heart. "
) * 3
QUESTION = "Where was Maret Olsun born?"


@dataclass
class Pair:
    sender: SenderService
    receiver: ReceiverService
    source: SenderClient
    target: ReceiverClient
    receiver_port: int

    async def deliver(self, recipe: str = "int8", receiver: str = "", **options) -> Progress:
        """Deliver TEXT (or a published context) to the receiver, to the end."""
        options.setdefault("question", QUESTION)
        if not options.get("context_id"):
            options.setdefault("text", TEXT)
        delivery = Delivery(receiver=receiver or self.target.address, recipe=recipe, **options)
        last = None
        async for progress in self.source.deliver(delivery):
            last = progress
        assert last is not None
        return last

    async def answer(self, cache_id: str, question: str = QUESTION, **options) -> str:
        return "".join(
            [p.text async for p in self.target.generate(Ask(cache_id, question, **options))]
        ).strip()


@pytest.fixture
def receiver_settings() -> ReceiverSettings:
    return ReceiverSettings()


@pytest.fixture
async def pair(random_lm, receiver_settings) -> AsyncIterator[Pair]:
    lm = random_lm("qwen2", "bfloat16")
    receiver = ReceiverService(Receiver(lm, added_bytes=added_by_grpc), receiver_settings)
    sender = SenderService(
        Sender(lm, added_bytes=added_by_grpc), SenderSettings(retry_pause_s=0.05), dial=to_receivers()
    )
    servers = [Server("127.0.0.1:0", receiver=receiver), Server("127.0.0.1:0", sender=sender)]
    ports = [await server.start() for server in servers]
    async with (
        SenderClient(f"127.0.0.1:{ports[1]}") as source,
        ReceiverClient(f"127.0.0.1:{ports[0]}") as target,
    ):
        yield Pair(sender, receiver, source, target, ports[0])
    for server in servers:
        await server.stop(0)


async def feed(service: ReceiverService, frames: Sequence[bytes]) -> list[PushStatus]:
    """Push frames in this process, to the end of what there is; the statuses that came."""

    async def stream() -> AsyncIterator[bytes]:
        for frame in frames:
            yield frame

    found = []
    with contextlib.suppress(TruncatedError):
        async for status in service.push_cache(stream()):
            found.append(status)
    return found


async def answer(service: ReceiverService, cache_id: str, question: str = QUESTION) -> str:
    """What a receiver in this process answers from a cache."""
    return "".join([piece.text async for piece in service.generate(Ask(cache_id, question))])
