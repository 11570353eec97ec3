"""Honest calls beside the fuzzing, which are answered rightly all the time; what they carry is where it begins."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from kvlink.errors import BusyError, KvlinkError
from kvlink.eval.questions import Item, generated
from kvlink.model.loading import embedded_folder
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery, Fetch
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from kvlink.v1 import wire_pb2 as pb
from tests.fuzz.agents import HONEST, NOBODY, Network
from tests.fuzz.messages import Seen

RECIPES = (
    "text",
    "raw",
    "lossless",
    "int8",
    "q2c@0.5 int4",
    "svd=8 int8",
    "transform=1",
    "q2c@0.25 transform=0.5 rest=2",
)
ITEMS = 3
PATIENCE_S = 60.0
"""An honest call may be told to come again for so long."""
_SHORT = 400
"""Characters of the contexts: short ones are read fast, and fuzzing is about many."""


@dataclass(slots=True)
class Report:
    rounds: int = 0
    busy: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Honest:
    """One peer that delivers, publishes, fetches, pushes and asks, and knows the answers."""

    def __init__(self, network: Network, seed: int) -> None:
        self._network = network
        self._receiver_at = network.agents["receiver"].address
        self._items: list[Item] = list(itertools.islice(generated(seed), ITEMS))
        self._expected: dict[str, str] = {}
        self._held: list[tuple[Item, str]] = []
        self.report = Report()
        self.transfers: list[list[bytes]] = []
        """Frames of one transfer of each recipe."""
        self.capabilities = common_pb2.GetCapabilitiesResponse()
        """The receiver's."""

    async def learn(self, seen: Seen) -> None:
        """Ask everything once while nobody disturbs; raises where an answer is not there."""
        async with self._clients() as (source, target):
            for item in self._items:
                self._expected[item.question] = await self._ask(source, target, item, "int8")
            for item in self._items:
                published = await source.publish(item.context)
                self._held.append((item, published.context_id))
                seen.add("context_id", published.context_id)
            item, context_id = self._held[0]
            for recipe in RECIPES:
                fetch = Fetch(context_id, item.question, recipe)
                self.transfers.append([frame async for frame in source.fetch(fetch)])
            there = convert.capabilities_to_proto(await target.capabilities())
            self.capabilities = common_pb2.GetCapabilitiesResponse(capabilities=there)
        for frames in self.transfers:
            for frame in frames:
                seen.note(pb.Frame.FromString(frame))
        for name in ("receiver", "sender"):
            seen.add("address", self._network.agents[name].address)
            seen.add("receiver", self._network.agents[name].address)
        seen.add("receiver", NOBODY)
        seen.add("receiver", self._network.liar_at)
        for recipe in RECIPES:
            seen.add("recipe", recipe)
        for item in self._items:
            seen.add("question", item.question)
            seen.add("text", item.context)

    @asynccontextmanager
    async def _clients(self) -> AsyncIterator[tuple[SenderClient, ReceiverClient]]:
        proof = self._network.credentials(HONEST)
        async with (
            SenderClient(self._network.agents["sender"].address, proof) as source,
            ReceiverClient(self._receiver_at, proof) as target,
        ):
            yield source, target

    def start_report(self) -> Report:
        """Begin a new account of what is answered."""
        self.report = Report()
        return self.report

    async def keep_asking(self, stop: asyncio.Event, pause_s: float) -> None:
        """Ask until told to stop; what is not answered, or wrongly, is in the report."""
        while not stop.is_set():
            try:
                async with self._clients() as (source, target):
                    for _ in range(8):
                        await self._round(source, target)
                        if stop.is_set():
                            return
                        await asyncio.sleep(pause_s)
            except KvlinkError as error:
                self.report.wrong.append(f"no connection: {type(error).__name__}: {error}")
                await asyncio.sleep(pause_s)

    async def _round(self, source: SenderClient, target: ReceiverClient) -> None:
        report = self.report
        item, context_id = self._held[report.rounds % len(self._held)]
        began = time.monotonic()
        while True:
            try:
                if report.rounds % 2:
                    answer = await self._ask(source, target, item, "int8")
                else:
                    answer = await self._fetch(source, target, item, context_id)
                break
            except BusyError as error:
                report.busy += 1
                if time.monotonic() - began > PATIENCE_S:
                    report.wrong.append(f"told to come again for {PATIENCE_S:g} s: {error}")
                    report.rounds += 1
                    return
                await asyncio.sleep(min(1.0, error.retry_after_s))
            except KvlinkError as error:
                report.wrong.append(f"round {report.rounds}: {type(error).__name__}: {error}")
                report.rounds += 1
                return
        expected = self._expected[item.question]
        if answer != expected:
            report.wrong.append(f"round {report.rounds}: answered {answer!r}, expected {expected!r}")
        report.rounds += 1
        report.slowest_s = max(report.slowest_s, time.monotonic() - began)

    async def _ask(self, source: SenderClient, target: ReceiverClient, item: Item, recipe: str) -> str:
        """A delivery of a text, and the answer from it."""
        cache_id = ""
        delivery = Delivery(self._receiver_at, item.question, recipe, text=item.context)
        async for progress in source.deliver(delivery):
            cache_id = progress.cache_id
        return await self._answer(target, cache_id, item.question)

    async def _fetch(self, source: SenderClient, target: ReceiverClient, item: Item, context_id: str) -> str:
        """A fetch of a published context, a push of what came, and the answer from it."""
        frames = [frame async for frame in source.fetch(Fetch(context_id, item.question, "int8"))]
        cache_id = ""
        async for status in target.push(frames):
            cache_id = cache_id if isinstance(status, int) else status.cache_id
        return await self._answer(target, cache_id, item.question)

    async def _answer(self, target: ReceiverClient, cache_id: str, question: str) -> str:
        text = "".join([piece.text async for piece in target.generate(Ask(cache_id, question, 12))])
        await target.delete_cache(cache_id)
        return text.strip()

    def requests(self, receiver_at: str) -> dict[str, list[Any]]:
        """Honest requests by method; ids are for the caller to fill in with its own."""
        item, other = self._items[0], self._items[1]
        text = item.context[:_SHORT]
        profile = (embedded_folder() / "kvlink.profile").read_bytes()
        deliver, fetch = sender_pb2.DeliverCacheRequest, sender_pb2.FetchCacheRequest
        turn = pb.Turn(role="user", content="Who was it?")
        asked = {"question": item.question, "recipe": "int8"}
        return {
            "GetCapabilities": [common_pb2.GetCapabilitiesRequest()],
            "GetTransferStatus": [receiver_pb2.GetTransferStatusRequest(transfer_id=b"t" * 16)],
            "Generate": [
                receiver_pb2.GenerateRequest(cache_id="x", question=item.question, max_new_tokens=2),
                receiver_pb2.GenerateRequest(
                    cache_id="x", question=other.question, max_new_tokens=2, temperature=0.7, seed=1
                ),
                receiver_pb2.GenerateRequest(
                    handle=f"kvlink://{self._network.agents['sender'].address}/x", max_new_tokens=2, **asked
                ),
            ],
            "CancelTransfer": [receiver_pb2.CancelTransferRequest(transfer_id=b"t" * 16)],
            "DeleteCache": [receiver_pb2.DeleteCacheRequest(cache_id="x")],
            "PutProfile": in_pieces(profile),
            "PublishContext": [
                sender_pb2.PublishContextRequest(text=text, lifetime_s=60),
                sender_pb2.PublishContextRequest(text=text, readers=["anna"], earlier_turns=[turn]),
                sender_pb2.PublishContextRequest(text=text, extends="x"),
            ],
            "UnpublishContext": [sender_pb2.UnpublishContextRequest(context_id="x")],
            "FetchCache": [
                *(fetch(context_id="x", question=item.question, recipe=recipe) for recipe in RECIPES[3:6]),
                fetch(
                    context_id="x",
                    target=common_pb2.Target(budget_bytes=20_000),
                    transfer_id=b"t" * 16,
                    **asked,
                ),
            ],
            "DeliverCache": [
                deliver(text=text, receiver=receiver_at, **asked),
                deliver(text=text, receiver=receiver_at, answer_here=True, explain=True, **asked),
                deliver(context_id="x", receiver=receiver_at, delivery_id=b"t" * 16, **asked),
                deliver(context_id="x", receiver=receiver_at, base_digest=b"d" * 16, **asked),
                deliver(context_id="x", receiver=self._network.liar_at, **asked),
            ],
            "CancelDelivery": [sender_pb2.CancelDeliveryRequest(delivery_id=b"t" * 16)],
        }


def in_pieces(profile: bytes) -> list[receiver_pb2.PutProfileRequest]:
    """The messages of a call that puts a profile."""
    digest, kind = blake3(profile).digest(length=16), receiver_pb2.PutProfileRequest
    start = receiver_pb2.PutProfileStart(digest=digest, total_bytes=len(profile))
    pieces = [profile[at : at + 200_000] for at in range(0, len(profile), 200_000)]
    return [kind(start=start), *(kind(data=piece) for piece in pieces)]
