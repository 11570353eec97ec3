"""Peers that die or fall silent: how long until the other side knows."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

from kvlink.agent.sender import Sender
from kvlink.errors import KvlinkError
from kvlink.eval.processes import agent
from kvlink.transport.api import Ask
from kvlink.transport.client import ReceiverClient
from tests.faults.cuts import LONG
from tests.faults.mutations import QUESTION
from tests.relay import relay


async def seconds_to_notice(sender: Sender, model: str) -> dict[str, float]:
    """By what happens to the receiver's process, while it takes a transfer and while it answers.

    `stopped`: SIGSTOP; its kernel still acknowledges every byte. `killed`: SIGKILL. `unreachable`: the
    way there and back swallows everything, connections stay open.
    """
    found = {}
    for how, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
        async with agent("receiver", model) as running:
            port = int(running.address.rpartition(":")[2])
            async with relay(port, rate_bps=4e6) as wire:
                found[f"push, {how}"] = await _pushing(
                    sender, wire, lambda r=running, n=number: r.process.send_signal(n)
                )
            if how == "stopped":
                running.process.send_signal(signal.SIGCONT)
                found[f"generate, {how}"] = await _generating(sender, running, number)
                with contextlib.suppress(ProcessLookupError):
                    running.process.send_signal(signal.SIGCONT)
    async with agent("receiver", model) as running:
        port = int(running.address.rpartition(":")[2])
        async with relay(port, rate_bps=4e6) as wire:
            found["push, unreachable"] = await _pushing(sender, wire, wire.stall)
            wire.go()
    return found


async def _pushing(sender: Sender, wire, strike) -> float:
    frames = sender.pack(sender.read(LONG), QUESTION, "raw").frames

    async def push() -> None:
        async with ReceiverClient(f"127.0.0.1:{wire.port}") as peer:
            async for _ in peer.push(frames):
                pass

    task = asyncio.create_task(push())
    while len(wire.seen) < 60_000:
        await asyncio.sleep(0.005)
    return await _until(task, strike)


async def _generating(sender: Sender, running, number: int) -> float:
    frames = sender.pack(sender.read(LONG), QUESTION, "int8").frames
    async with ReceiverClient(running.address) as peer:
        cache_id = ""
        async for item in peer.push(frames):
            cache_id = "" if isinstance(item, int) else item.cache_id

        async def ask() -> None:
            running.process.send_signal(number)
            async for _ in peer.generate(Ask(cache_id, QUESTION)):
                pass

        return await _until(asyncio.create_task(ask()), lambda: None)


async def _until(task: asyncio.Task, strike) -> float:
    """Seconds from the strike to the error; 600 where none comes."""
    strike()
    began = time.monotonic()
    done, _ = await asyncio.wait({task}, timeout=120)
    if not done:
        task.cancel()
        return 600.0
    return time.monotonic() - began if isinstance(task.exception(), KvlinkError) else 600.0
