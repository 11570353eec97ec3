"""Transfers that are cut: at every frame, on real connections, and by the death of either process.

Counts what was sent again although the receiver had said that it is durable, and compares the answer of
every transfer that was continued with the answer of one that was not cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.settings import ReceiverSettings
from kvlink.errors import KvlinkError, PeerUnavailableError
from kvlink.eval.processes import agent
from kvlink.transport.api import Ask, Delivery, PushStatus
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.server import Server
from tests.agent.conftest import answer, feed
from tests.command import free_address
from tests.faults.mutations import QUESTION, RECIPES, TEXT
from tests.relay import relay

LONG = " ".join([TEXT] * 12)


@dataclass(slots=True)
class Report:
    cut_points: int = 0
    resent_bytes: int = 0
    in_flight_bytes: int = 0
    """Sent again although it had left before the cut: it was never said to be durable."""
    answers_lost: int = 0
    answers_wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self, what: str, found: str | None, expected: str) -> None:
        self.cut_points += 1
        if found is None:
            self.answers_lost += 1
            self.notes.append(f"{what}: no answer")
        elif found != expected:
            self.answers_wrong += 1
            self.notes.append(f"{what}: {found!r}, not {expected!r}")


class Pusher:
    """Pushes one transfer over as many connections as it takes, and counts what travels again."""

    def __init__(self, frames: Sequence[bytes], report: Report) -> None:
        self.frames, self.report = frames, report
        self.durable = 0
        self.left: set[int] = set()

    async def once(self, address: str) -> str:
        """One attempt; the cache's id where it came to its end."""
        async with ReceiverClient(address) as peer:
            async for item in peer.push(self.frames):
                if isinstance(item, PushStatus):
                    if item.state == "durable":
                        self.durable = max(self.durable, item.next_sequence)
                    if item.state == "complete":
                        return item.cache_id
                else:
                    if item < self.durable:
                        self.report.resent_bytes += len(self.frames[item])
                    elif item in self.left:
                        self.report.in_flight_bytes += len(self.frames[item])
                    self.left.add(item)
        raise PeerUnavailableError("the push ended without a cache")

    async def until_complete(self, address: str, patience_s: float = 60.0) -> str:
        last = time.monotonic() + patience_s
        while True:
            try:
                return await self.once(address)
            except KvlinkError:
                if time.monotonic() > last:
                    raise
                await asyncio.sleep(0.1)


async def ask(address: str, cache_id: str) -> str:
    async with ReceiverClient(address) as peer:
        return "".join([piece.text async for piece in peer.generate(Ask(cache_id, QUESTION))]).strip()


async def at_every_frame(sender: Sender, report: Report) -> None:
    """In this process: the receiver takes n frames, dies, and its next life goes on from disk."""
    receiver = Receiver(sender.lm)
    for recipe in RECIPES:
        context = sender.read(TEXT)
        frames = sender.pack(context, QUESTION, recipe).frames
        expected = receiver.answer(receiver.receive(frames), QUESTION).text
        for cut in range(1, len(frames) + 1):
            with tempfile.TemporaryDirectory() as folder:
                settings = ReceiverSettings(staging=Path(folder), durable_bytes=4000)
                told = await feed(ReceiverService(receiver, settings), frames[:cut])
                durable = max([s.next_sequence for s in told if s.state == "durable"], default=0)
                second = ReceiverService(receiver, settings)
                begun = (await feed(second, frames[:1]))[0]
                if begun.state != "complete":
                    report.resent_bytes += sum(map(len, frames[begun.next_sequence : durable]))
                    begun = (await feed(second, [frames[0], *frames[begun.next_sequence :]]))[-1]
                found = None
                if begun.state == "complete":
                    found = (await answer(second, begun.cache_id, QUESTION)).strip()
                report.check(f"{recipe}, cut after frame {cut - 1}", found, expected)


async def on_connections(sender: Sender, report: Report, count: int) -> None:
    """Real gRPC through a relay that cuts after n bytes, n all over the transfer, and once more later."""
    receiver = Receiver(sender.lm)
    service = ReceiverService(receiver, ReceiverSettings(durable_bytes=20_000))
    server = Server("127.0.0.1:0", receiver=service)
    port = await server.start()
    context = sender.read(LONG)
    for number in range(count):
        recipe = ("raw", "int8", "transform=1", "text")[number % 4]
        frames = sender.pack(context, QUESTION, recipe).frames
        expected = receiver.answer(receiver.receive(frames), QUESTION).text
        total = sum(map(len, frames))
        async with relay(port, cut_after=500 + total * number // count, rate_bps=40e6) as wire:
            found = None
            with contextlib.suppress(KvlinkError):
                cache_id = await Pusher(frames, report).until_complete(f"127.0.0.1:{wire.port}", 20.0)
                found = await ask(f"127.0.0.1:{port}", cache_id)
            report.check(f"{recipe}, cut after {500 + total * number // count} bytes", found, expected)
    await server.stop(0)


async def with_dying_receivers(sender: Sender, report: Report, model: str, count: int) -> None:
    """A receiver process with staging is killed in mid-transfer, and another one takes its place."""
    own = Receiver(sender.lm)
    frames = sender.pack(sender.read(LONG), QUESTION, "raw").frames
    expected = own.answer(own.receive(frames), QUESTION).text
    total = sum(map(len, frames))
    for number in range(count):
        frames = sender.pack(sender.read(LONG), QUESTION, "raw").frames
        address = free_address()
        with tempfile.TemporaryDirectory() as folder:
            options = ["--staging", folder, "--durable-every", "50kB"]
            pusher, found = Pusher(frames, report), None
            async with (
                agent("receiver", model, options, address) as first,
                relay(int(address.split(":")[1]), rate_bps=8e6) as wire,
            ):
                pushing = asyncio.create_task(pusher.until_complete(f"127.0.0.1:{wire.port}"))
                while len(wire.seen) < total * (number + 1) / (count + 1) and not pushing.done():
                    await asyncio.sleep(0.005)
                first.process.send_signal(signal.SIGKILL)
                await first.process.wait()
                async with agent("receiver", model, options, address):
                    with contextlib.suppress(KvlinkError):
                        found = await ask(address, await pushing)
            report.check(f"receiver killed after {number + 1}/{count + 1} of the transfer", found, expected)


async def with_dying_senders(sender: Sender, report: Report, model: str, count: int) -> None:
    """A sender process with staging is killed in mid-delivery; the next one goes on without packing."""
    own = Receiver(sender.lm)
    expected = own.answer(own.receive(sender.pack(sender.read(LONG), QUESTION, "raw").frames), QUESTION).text
    service = ReceiverService(own, ReceiverSettings(durable_bytes=50_000))
    server = Server("127.0.0.1:0", receiver=service)
    port = await server.start()
    address = free_address()
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--staging", folder]
            key = os.urandom(16)
            async with relay(port, rate_bps=8e6) as wire:
                delivery = Delivery(f"127.0.0.1:{wire.port}", QUESTION, "raw", text=LONG, delivery_id=key)
                found = None
                async with agent("sender", model, options, address) as first:
                    delivering = asyncio.create_task(_deliver(address, delivery))
                    while not wire.seen or len(wire.seen) < 100_000 * (number + 1):
                        await asyncio.sleep(0.005)
                    kept = (await service.transfer_status(key)).next_sequence
                    first.process.send_signal(signal.SIGKILL)
                    await first.process.wait()
                    sent = len(wire.seen)
                    async with agent("sender", model, options, address):
                        with contextlib.suppress(KvlinkError):
                            found = await ask(f"127.0.0.1:{port}", await delivering)
                staged = sorted(Path(folder).glob("*.kvl"))
                if not staged:
                    report.notes.append("the sender staged nothing")
                again = len(wire.seen) - sent
                if kept > 2 and again > 0.97 * sent + 1_000_000:
                    report.notes.append(f"sender killed: {again} bytes after the restart, {sent} before")
            report.check(f"sender killed after {100_000 * (number + 1)} bytes", found, expected)
    await server.stop(0)


async def _deliver(address: str, delivery: Delivery) -> str:
    """As a patient caller does: again with the same name until it is there."""
    last = time.monotonic() + 90
    while True:
        try:
            async with SenderClient(address) as source:
                async for progress in source.deliver(replace(delivery)):
                    if progress.done:
                        return progress.cache_id
        except KvlinkError:
            if time.monotonic() > last:
                raise
            await asyncio.sleep(0.2)


async def run(sender: Sender, model: str, connections: int, deaths: int) -> Report:
    report = Report()
    await at_every_frame(sender, report)
    await on_connections(sender, report, connections)
    await with_dying_receivers(sender, report, model, deaths)
    await with_dying_senders(sender, report, model, deaths)
    return report
