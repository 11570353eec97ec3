"""The demo: two agents as processes on loopback, questions, and one table.

Every recipe is asked every question over real gRPC: the sender holds the context, delivers it
reduced for the question, and the receiver answers. The reference is what the sender itself
answers from its own cache. Figures are means over the questions; TTFT is a median.

Does not know: how a transfer is made. Place on the path: outside it, as a user would be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvlink.errors import PeerUnavailableError
from kvlink.eval.items import Item
from kvlink.eval.passages import UNKNOWN
from kvlink.eval.processes import agent
from kvlink.eval.questions import from_file, load_items, prose
from kvlink.eval.rows import Outcome, Row, summarise
from kvlink.eval.score import exact_match, f1
from kvlink.recipe import PRESETS
from kvlink.transport.api import Ask, Delivery, Progress
from kvlink.transport.client import ReceiverClient, SenderClient

INT8_AGREEMENT = 0.99


@dataclass(slots=True)
class Report:
    """The demo's result. `failures` is empty where it holds what it promises."""

    model: str
    seed: int
    rows: list[Row]
    by_source: dict[str, dict[str, float]]
    failures: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    story: dict[str, Any] = field(default_factory=dict)
    """The fields of a `page.story.Story`, of one more transfer of the first question."""

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "story"}
        return {**data, "rows": [row.to_dict() for row in self.rows]}


def choose_items(
    data: str,
    count: int,
    seed: int,
    with_prose: bool = True,
    on_left_out: Callable[[str], None] = lambda _: None,
) -> list[Item]:
    """Generated questions and the five over prose, or the first `count` of a file."""
    if data.partition(":")[0] != "generated":
        return from_file(data, on_left_out)[:count]
    return [*load_items(data, count, seed), *(prose() if with_prose else [])]


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
        f1=f1(answer, item.answers, item.rules),
        f1_full=f1(own_answer, item.answers, item.rules),
        em=exact_match(answer, item.answers, item.rules),
        agrees=answer.strip() == own_answer,
        wire_bytes=done.receipt.wire_bytes,
        bits_per_element=done.receipt.bits_per_element,
        ttft_s=ttft_s,
        context_tokens=done.receipt.context_tokens,
        kept_tokens=done.receipt.kept_tokens or done.receipt.context_tokens,
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
        agent("receiver", model, options) as reader,
        agent("sender", model, options) as writer,
        SenderClient(writer.address) as sender,
        ReceiverClient(reader.address) as receiver,
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
        story = await _tell(sender, receiver, items[0], list(recipes)[-1])
    return replace(_sum_up(items, model, seed, outcomes), story=story)


async def _tell(sender: SenderClient, receiver: ReceiverClient, item: Item, recipe: str) -> dict[str, Any]:
    """One transfer in all its parts, read anew so that the prefill is in it."""
    delivery = Delivery(
        receiver.address, item.question, recipe, text=item.context, answer_here=True, explain=True
    )
    done = await deliver(sender, delivery)
    answer, receipt = "", done.receipt
    async for piece in receiver.generate(Ask(done.cache_id, item.question)):
        answer += piece.text
        receipt = done.receipt.with_stages(**piece.receipt.stage_s)
    await receiver.delete_cache(done.cache_id)
    reader = await receiver.capabilities()
    return {
        "question": item.question, "answer": answer.strip(), "sender_answer": done.sender_answer,
        "text": item.context, "receipt": receipt, "told": done.explanation,
        "reads_tokens_per_s": reader.prefill_tokens_per_s,
    }  # fmt: skip


def _sum_up(items: Sequence[Item], model: str, seed: int, outcomes: dict[str, list[Outcome]]) -> Report:
    known: dict[str, Any] = {"table": "demo", "model": model, "data": items[0].source, "seed": seed}
    rows = [summarise(recipe, found, **known) for recipe, found in outcomes.items()]
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
        if need is not None and row.agreement is not None and row.agreement < need:
            report.failures.append(
                f"{row.recipe} agrees with the sender's own answers on {row.agreement:.1%}, expected {need:.0%}"
            )
    for index in _shown(items):
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


def _shown(items: Sequence[Item]) -> list[int]:
    """Which questions are shown as examples: of each source the first two that their context answers."""
    found: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.answers[0] != UNKNOWN:
            found.setdefault(item.source, []).append(index)
    return [index for indices in found.values() for index in indices[:2]]
