"""One greedy peer with 50 open calls of a kind, and an honest one that wants one answer: how long it waits.

`python -m tests.faults.fairness` prints the table of docs/operations.md. Both peers prove who they are; the
agents run as processes of their own with their defaults, but for memory that is full long before the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from kvlink.agent.sender import Sender
from kvlink.errors import KvlinkError
from kvlink.eval.processes import agent
from kvlink.model.loading import EMBEDDED, load
from kvlink.transport import certs
from kvlink.transport.api import Ask, Fetch
from kvlink.transport.certs import Member
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.credentials import Credentials
from tests.command import CONTEXT, QUESTION, free_address
from tests.forging import forged

GREEDY = 50
ROUNDS = 30
MOST = 3.0
"""Times its time alone that an honest peer may wait."""

Work = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds are medians of an honest peer's calls; `kept`: whether its first value was there at the end."""

    kind: str
    alone_s: float
    beside_s: float
    refused: int
    kept: bool

    @property
    def ratio(self) -> float:
        return self.beside_s / self.alone_s

    @property
    def fair(self) -> bool:
        return self.ratio <= MOST and self.kept and not self.refused


@dataclass(frozen=True, slots=True)
class _Peers:
    """Clients of both agents: the honest sender and client, and the greedy ones."""

    good: ReceiverClient
    evil: ReceiverClient
    anna: ReceiverClient
    mallory: ReceiverClient
    anna_reads: SenderClient
    mallory_reads: SenderClient


@contextlib.asynccontextmanager
async def _network() -> AsyncIterator[_Peers]:
    receiver_at, good_at, evil_at = (free_address() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        net = Path(folder) / "net"
        members = [Member("receiver", "receiver", receiver_at), Member("good", "sender", good_at)]
        members += [Member("evil", "sender", evil_at), Member("anna", "client"), Member("mallory", "client")]
        certs.begin(net, members)

        def options(name: str) -> list[str]:
            return ["--credentials", str(net / name), "--max-held", "4MB"]

        def dial(kind: type, at: str, name: str) -> object:
            return stack.enter_async_context(kind(at, Credentials(net / name)))

        async with (
            agent("receiver", EMBEDDED, options("receiver"), receiver_at),
            agent("sender", EMBEDDED, options("good"), good_at),
            contextlib.AsyncExitStack() as stack,
        ):
            names = [(ReceiverClient, receiver_at, who) for who in ("good", "evil", "anna", "mallory")]
            names += [(SenderClient, good_at, who) for who in ("anna", "mallory")]
            yield _Peers(*[await dial(*one) for one in names])  # type: ignore[misc]


async def _median(work: Work, rounds: int) -> tuple[float, int]:
    """Median seconds of calls one after the other, and how many were refused."""
    seconds, refused = [], 0
    for _ in range(rounds):
        began = time.perf_counter()
        try:
            await work()
        except KvlinkError:
            refused += 1
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), refused


@contextlib.asynccontextmanager
async def _greed(work: Work) -> AsyncIterator[None]:
    """`GREEDY` calls at any moment: one that ends is made again at once, one that is refused when it was told."""

    async def always() -> None:
        while True:
            try:
                await work()
            except KvlinkError as error:
                await asyncio.sleep(error.retry_after_s or 0.1)

    tasks = [asyncio.create_task(always()) for _ in range(GREEDY)]
    await asyncio.sleep(1.0)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _row(
    kind: str, honest: Work, greedy: Work, kept: Callable[[], Awaitable[bool]], rounds: int
) -> Row:
    await _median(honest, 3)
    alone, none = await _median(honest, rounds)
    async with _greed(greedy):
        beside, refused = await _median(honest, rounds)
        row = Row(kind, alone, beside, none + refused, await kept())
    print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return row


async def _push(peer: ReceiverClient, frames: list[bytes], readers: tuple[str, ...]) -> str:
    cache_id = ""
    async for item in peer.push(frames, readers):
        cache_id = cache_id if isinstance(item, int) else item.cache_id
    return cache_id


async def _answer(peer: ReceiverClient, ask: Ask) -> str:
    return "".join([piece.text async for piece in peer.generate(ask)])


async def measure(rounds: int = ROUNDS) -> list[Row]:
    """One row for each kind of call."""
    sender = Sender(load())
    frames = sender.pack(sender.read(CONTEXT), QUESTION, "int8").frames
    async with _network() as peers:

        async def push() -> None:
            """And delete: that its own values fill its share is not what is measured."""
            await peers.good.delete_cache(await _push(peers.good, forged(frames), ("anna",)))

        async def hold() -> None:
            """Begin a transfer and leave it open, for as long as the receiver lets it be."""
            call = peers.evil._method("PushCache")(metadata=peers.evil._shown())
            try:
                await call.write(forged(frames)[0])
                while await call.read() is not grpc.aio.EOF:
                    pass
            except (grpc.RpcError, asyncio.InvalidStateError):
                await asyncio.sleep(1.0)
            finally:
                call.cancel()

        first = await _push(peers.good, list(frames), ("anna",))
        expected = await _answer(peers.anna, Ask(first, QUESTION))

        async def still_answers() -> bool:
            return await _answer(peers.anna, Ask(first, QUESTION)) == expected

        mallorys = await _push(peers.evil, forged(frames), ("mallory",))
        rows = [
            await _row(
                "generations",
                lambda: _answer(peers.anna, Ask(first, QUESTION)),
                lambda: _answer(peers.mallory, Ask(mallorys, QUESTION, 1024, 10.0, secrets.randbelow(2**31))),
                still_answers, rounds,
            )
        ]  # fmt: skip
        rows.append(await _row("transfers", push, hold, still_answers, rounds))
        mine = (await peers.anna_reads.publish(CONTEXT)).context_id
        theirs = (await peers.mallory_reads.publish(CONTEXT)).context_id

        async def fetch(peer: SenderClient, context_id: str) -> int:
            return len([frame async for frame in peer.fetch(Fetch(context_id, QUESTION, "int8"))])

        async def mine_still_opens() -> bool:
            return await fetch(peers.anna_reads, mine) > 0

        async def grab() -> None:
            """Publish and fetch without end."""
            await fetch(
                peers.mallory_reads, (await peers.mallory_reads.publish(CONTEXT)).context_id or theirs
            )

        rows.append(
            await _row("reads", lambda: fetch(peers.anna_reads, mine), grab, mine_still_opens, rounds)
        )
    return rows


def table(rows: list[Row]) -> str:
    """As docs/operations.md has it."""
    lines = [
        "| calls | alone | beside 50 of one greedy peer | ratio | refused | its value |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.kind} | {row.alone_s * 1000:,.0f} ms | {row.beside_s * 1000:,.0f} ms | {row.ratio:.1f} "
            f"| {row.refused} | {'kept' if row.kept else 'lost'} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = asyncio.run(measure())
    print(table(rows))
    print(json.dumps([{**asdict(row), "ratio": round(row.ratio, 2)} for row in rows]))
    sys.exit(not all(row.fair for row in rows))


if __name__ == "__main__":
    main()
