"""Load: many agents against one receiver, for minutes, every answer checked against its own context.

Each agent holds contexts of its own, and in turn pushes one of them, asks its question, checks the
answer against what the same frames answer without any load, and deletes the cache. The receiver is a
process of its own; its memory is read from the system while it works.

Does not know: how a transfer is made. Place on the path: outside it, as many users would be.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvlink.agent.context import Context, Look
from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import BusyError, KvlinkError, RemoteProtocolError
from kvlink.eval.processes import Running, agent
from kvlink.eval.questions import generated
from kvlink.model.loading import LanguageModel, load
from kvlink.recipe import Recipe
from kvlink.transport.api import Ask
from kvlink.transport.client import ReceiverClient
from kvlink.transport.link import added_by_grpc

RECIPES = ("text", "raw", "int8", "q2c+draft@0.25 int4", "transform=1")
CONTEXTS_EACH = 2
WARM_UP = 0.25
"""Share of the time that the receiver's memory has to settle."""
_WINDOW = 0.15
_DIAL_AGAIN = 20


@dataclass(slots=True)
class Load:
    """What came of it. Seconds; `shares`: answers of each agent.

    `lost`: a question without an answer. `mixed`: an answer that belongs to another context. `other`: an
    answer that belongs to none: the arithmetic of another build, or a fault.
    """

    agents: int
    minutes: float
    answers: int = 0
    lost: int = 0
    mixed: int = 0
    other: int = 0
    busy: int = 0
    errors: list[str] = field(default_factory=list)
    push_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    shares: list[int] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, bytes) of the receiver."""

    def resident_before(self) -> int:
        """Bytes right after the warm-up, median of a window."""
        return self._median(WARM_UP, WARM_UP + _WINDOW)

    def resident_after(self) -> int:
        """Bytes at the end, median of a window."""
        return self._median(1 - _WINDOW, 1.0)

    def _median(self, begin: float, end: float) -> int:
        last = self.resident[-1][0] if self.resident else 0.0
        window = [bytes_ for at, bytes_ in self.resident if begin * last <= at <= end * last]
        return int(statistics.median(window)) if window else 0

    def to_dict(self) -> dict[str, object]:
        before, after = self.resident_before(), self.resident_after()
        return {
            "agents": self.agents, "minutes": self.minutes, "answers": self.answers,
            "answers_lost": self.lost, "answers_mixed": self.mixed, "answers_other": self.other,
            "busy": self.busy, "errors": self.errors[:5],
            "push_ms": _percentiles(self.push_s), "first_token_ms": _percentiles(self.first_token_s),
            "total_ms": _percentiles(self.total_s),
            "answers_of_an_agent": [min(self.shares), max(self.shares)],
            "rss_before_bytes": before, "rss_after_bytes": after,
            "rss_growth": after / before - 1 if before else 0.0,
        }  # fmt: skip


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in _SHARES}
    return {name: round(1e3 * value, 1) for name, value in at.items()}


_SHARES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True, slots=True)
class _Task:
    """A context that an agent holds, its question, and what the receiver has to answer."""

    context: Context
    question: str
    recipe: Recipe
    look: Look
    expected: str


def prepare(lm: LanguageModel, count: int, seed: int) -> list[_Task]:
    """`count` tasks whose answers differ from each other, with the answers that are expected."""
    sender, receiver = Sender(lm, added_bytes=added_by_grpc), Receiver(lm, added_bytes=added_by_grpc)
    found: dict[str, _Task] = {}
    for item in itertools.islice(generated(seed), 8 * count):
        recipe = Recipe.parse(RECIPES[len(found) % len(RECIPES)])
        context = sender.read(item.context)
        look = sender.look(context, item.question, recipe.selection)
        frames = sender.pack(context, item.question, recipe, look=look).frames
        answer = receiver.answer(receiver.receive(frames), item.question).text
        if answer not in found:
            found[answer] = _Task(context, item.question, recipe, look, answer)
        if len(found) == count:
            break
    return list(found.values())


async def run_load(
    minutes: float,
    agents: int,
    model: str,
    seed: int = 0,
    options: Sequence[str] = (),
    on_second: Callable[[], None] = lambda: None,
) -> Load:
    """Keep `agents` agents busy against one receiver process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the receiver
    try:
        lm = await asyncio.to_thread(load, model)
        tasks = await asyncio.to_thread(prepare, lm, agents * CONTEXTS_EACH, seed)
        told = Load(agents, minutes, shares=[0] * agents)
        async with agent("receiver", model, options) as running:
            until = time.monotonic() + 60 * minutes
            watching = asyncio.create_task(_watch(running, told, until, on_second))
            own = [tasks[number::agents] or tasks[:1] for number in range(agents)]
            answers = {task.expected for task in tasks}
            await asyncio.gather(
                *(
                    _agent(
                        Sender(lm, added_bytes=added_by_grpc),
                        running.address,
                        own[number],
                        answers,
                        told,
                        number,
                        until,
                    )
                    for number in range(agents)
                )
            )
            await watching
        return told
    finally:
        torch.set_num_threads(threads)


async def _watch(running: Running, told: Load, until: float, on_second: Callable[[], None]) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        told.resident.append((time.monotonic() - began, running.resident_bytes()))
        on_second()
        await asyncio.sleep(1.0)


async def _agent(
    sender: Sender,
    address: str,
    tasks: Sequence[_Task],
    answers: set[str],
    told: Load,
    number: int,
    until: float,
) -> None:
    """One agent: a fresh connection now and then, as agents come and go."""
    turn = 0
    while time.monotonic() < until:
        async with ReceiverClient(address) as peer:
            for _ in range(_DIAL_AGAIN):
                if time.monotonic() >= until:
                    return
                task = tasks[turn % len(tasks)]
                turn += 1
                try:
                    answer = await _ask(sender, peer, task, told)
                except KvlinkError as error:
                    told.lost += 1
                    told.errors.append(f"{type(error).__name__}: {error}")
                    continue
                told.answers += 1
                told.shares[number] += 1
                if answer != task.expected:
                    told.mixed += answer in answers
                    told.other += answer not in answers


async def _ask(sender: Sender, peer: ReceiverClient, task: _Task, told: Load) -> str:
    """Push, ask, delete. What the receiver is too busy for is tried again when it says."""
    transfer = await asyncio.to_thread(
        sender.pack, task.context, task.question, task.recipe, None, task.look, secrets.token_bytes(16)
    )
    while True:
        began = time.perf_counter()
        try:
            cache_id = ""
            async for item in peer.push(transfer.frames):
                cache_id = "" if isinstance(item, int) else item.cache_id
            pushed_s, first_s, text = time.perf_counter() - began, 0.0, ""
            async for piece in peer.generate(Ask(cache_id, task.question)):
                first_s = first_s or time.perf_counter() - began
                text += piece.text
            break
        except BusyError as error:
            told.busy += 1
            await asyncio.sleep(error.retry_after_s)
    if not cache_id:
        raise RemoteProtocolError("the push ended without a cache")
    told.push_s.append(pushed_s)
    told.first_token_s.append(first_s)
    told.total_s.append(time.perf_counter() - began)
    await peer.delete_cache(cache_id)
    return text.strip()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
