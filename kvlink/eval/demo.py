"""The demo: two agents as processes on loopback, questions, and one table.

Every recipe is asked every question over real gRPC: the sender holds the context, delivers it
reduced for the question, and the receiver answers. The reference is what the sender itself
answers from its own cache. Figures are means over the questions; TTFT is a median.

Does not know: how a transfer is made. Place on the path: outside it, as a user would be.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from kvlink.errors import PeerUnavailableError
from kvlink.eval.questions import Item, generated, prose, squad
from kvlink.eval.score import f1, interval
from kvlink.recipe import PRESETS, Recipe
from kvlink.transport.api import Ask, Delivery, Progress
from kvlink.transport.client import ReceiverClient, SenderClient

INT8_AGREEMENT = 0.99
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question by one recipe."""

    answer: str
    own_answer: str
    f1: float
    f1_full: float
    agrees: bool
    wire_bytes: int
    bits_per_element: float
    ttft_s: float
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    `f1_low`, `f1_high`: 95 % bootstrap interval. `agreement`: share of answers equal to the
    sender's own, letter for letter. `wire_bytes`: mean a question. `ttft_s`: median, seconds.
    """

    mode: str
    recipe: str
    recipe_full: str
    n: int
    f1: float
    f1_low: float
    f1_high: float
    f1_full: float
    agreement: float
    wire_bytes: float
    bits_per_element: float
    ttft_s: float
    context_tokens: float


@dataclass(slots=True)
class Report:
    """The demo's result. `failures` is empty where it holds what it promises."""

    model: str
    seed: int
    rows: list[Row]
    by_source: dict[str, dict[str, float]]
    failures: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_items(data: Path | None, count: int, seed: int, with_prose: bool = True) -> list[Item]:
    """Generated questions and the five over prose, or the first `count` of a SQuAD file."""
    if data is not None:
        return squad(data)[:count]
    return [*itertools.islice(generated(seed), count), *(prose() if with_prose else [])]


@asynccontextmanager
async def agent(kind: str, model: str, options: Sequence[str] = ()) -> AsyncIterator[str]:
    """A sender or receiver process on loopback, on a port of its own; its address once it serves."""
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would block the agent
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvlink", kind, "--listen", "127.0.0.1:0", "--model", model, *options,
            stdout=asyncio.subprocess.PIPE, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            yield await _address(kind, process, log)
        finally:
            await _stop(process)


async def _address(kind: str, process: asyncio.subprocess.Process, log: IO[bytes]) -> str:
    """What the agent says it listens on. Raises PeerUnavailableError with its own last words."""
    line = b""
    if process.stdout is not None:
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except TimeoutError:
            raise PeerUnavailableError(f"the {kind} does not serve within {START_S:g} s") from None
    found = re.search(r"listens on (\S+)", line.decode())
    if found is None:
        log.seek(0)
        raise PeerUnavailableError(
            f"the {kind} did not start: {log.read().decode(errors='replace').strip()[-800:]}"
        )
    return found[1]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask the agent to stop, and make it if it does not."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        process.kill()
        await process.wait()


async def deliver(sender: SenderClient, delivery: Delivery) -> Progress:
    """Run a delivery to its end."""
    last: Progress | None = None
    async for progress in sender.deliver(delivery):
        last = progress
    if last is None or not last.done:
        raise PeerUnavailableError("the sender ended the delivery without a result")
    return last


async def ask_once(
    sender: SenderClient, receiver: ReceiverClient, context_id: str, item: Item, recipe: str, own_answer: str
) -> Outcome:
    """One question: deliver, generate, forget. TTFT runs from the request to the first token."""
    began = time.perf_counter()
    done = await deliver(sender, Delivery(receiver.address, item.question, recipe, context_id))
    ttft_s, answer = 0.0, ""
    async for piece in receiver.generate(Ask(done.cache_id, item.question)):
        ttft_s = ttft_s or time.perf_counter() - began
        answer += piece.text
    await receiver.delete_cache(done.cache_id)
    return Outcome(
        answer=answer.strip(),
        own_answer=own_answer,
        f1=f1(answer, item.answers),
        f1_full=f1(own_answer, item.answers),
        agrees=answer.strip() == own_answer,
        wire_bytes=done.receipt.wire_bytes,
        bits_per_element=done.receipt.bits_per_element,
        ttft_s=ttft_s,
        context_tokens=done.receipt.context_tokens,
    )


async def own_answer(sender: SenderClient, receiver: ReceiverClient, context_id: str, question: str) -> str:
    """What the sender answers from its own cache; the delivery around it is not counted."""
    done = await deliver(sender, Delivery(receiver.address, question, "text", context_id, answer_here=True))
    await receiver.delete_cache(done.cache_id)
    return done.sender_answer


async def run_demo(
    items: Sequence[Item],
    model: str,
    *,
    seed: int = 0,
    recipes: Sequence[str] = PRESETS,
    options: Sequence[str] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Report:
    """Start both agents, ask every item by every recipe, and sum up."""
    outcomes: dict[str, list[Outcome]] = {recipe: [] for recipe in recipes}
    async with (
        agent("receiver", model, options) as receiver_address,
        agent("sender", model, options) as sender_address,
        SenderClient(sender_address) as sender,
        ReceiverClient(receiver_address) as receiver,
    ):
        # One round that is not counted: first calls pay for memory and threads.
        warm = await sender.publish(items[0].context)
        for recipe in recipes:
            await ask_once(sender, receiver, warm.context_id, items[0], recipe, "")
        await sender.unpublish(warm.context_id)
        for item in items:
            published = await sender.publish(item.context)
            own = await own_answer(sender, receiver, published.context_id, item.question)
            for recipe in recipes:
                outcomes[recipe].append(
                    await ask_once(sender, receiver, published.context_id, item, recipe, own)
                )
                on_step()
            await sender.unpublish(published.context_id)
    return _sum_up(items, model, seed, outcomes)


def _sum_up(items: Sequence[Item], model: str, seed: int, outcomes: dict[str, list[Outcome]]) -> Report:
    rows = [_row(recipe, found) for recipe, found in outcomes.items()]
    sources: dict[str, dict[str, float]] = {}
    for source in dict.fromkeys(item.source for item in items):
        chosen = [i for i, item in enumerate(items) if item.source == source]
        sources[source] = {
            "n": len(chosen),
            **{recipe: statistics.fmean(found[i].f1 for i in chosen) for recipe, found in outcomes.items()},
        }
    report = Report(model, seed, rows, sources)
    for row in rows:
        need = {"raw": 1.0, "int8": INT8_AGREEMENT}.get(row.recipe)
        if need is not None and row.agreement < need:
            report.failures.append(
                f"{row.recipe} agrees with the sender's own answers on {row.agreement:.1%}, expected {need:.0%}"
            )
    for index in [*range(min(2, len(items))), len(items) - 1]:
        item = items[index]
        report.examples.append(
            {
                "question": item.question,
                "gold": item.answers[0],
                "own_answer": next(iter(outcomes.values()))[index].own_answer,
                "answers": {recipe: found[index].answer for recipe, found in outcomes.items()},
            }
        )
    return report


def _row(recipe: str, found: Sequence[Outcome]) -> Row:
    mean = statistics.fmean
    parsed = Recipe.parse(recipe)
    low, high = interval([o.f1 for o in found])
    return Row(
        mode=parsed.mode,
        recipe=recipe,
        recipe_full=str(parsed),
        n=len(found),
        f1=mean(o.f1 for o in found),
        f1_low=low,
        f1_high=high,
        f1_full=mean(o.f1_full for o in found),
        agreement=mean(o.agrees for o in found),
        wire_bytes=mean(o.wire_bytes for o in found),
        bits_per_element=mean(o.bits_per_element for o in found),
        ttft_s=statistics.median(o.ttft_s for o in found),
        context_tokens=mean(o.context_tokens for o in found),
    )
