"""Commands that answer questions through two agents: demo and ask.

Does not know: how an answer comes about. Place on the path: the face of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TimeRemainingColumn

from kvlink import errors
from kvlink.cli.common import credentials, read_context, run, warn
from kvlink.cli.kinds import RecipeText, Text
from kvlink.cli.options import (
    AllowText,
    Bits,
    Budget,
    Creds,
    Ctx,
    Data,
    Deadline,
    Insecure,
    Json,
    Model,
    Quality,
    Question,
    ReceiverAt,
    Recipe,
    ReportFile,
    SenderAt,
    Timeout,
    Verify,
    count,
    flag,
    option,
    target_of,
)
from kvlink.defaults import CALL_S, MODEL, RECEIVER, SENDER
from kvlink.files import Output
from kvlink.terminal import note, progress, say, say_json, say_text


def demo(
    model: Model = MODEL,
    data: Data = "generated",
    n: Annotated[int, count("n", "Generated questions, or questions of the file.")] = 20,
    seed: Annotated[int, count("seed", "Of the generator, and of the draw from a file.", least=0)] = 7,
    recipe: Annotated[
        list[str] | None, option("recipe", RecipeText(), "Recipe to compare; repeat. Default: eight.")
    ] = None,
    prose: Annotated[bool, flag("prose", "Add the five questions over plain prose.")] = True,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Start two agents on loopback, ask questions by each recipe, print what it cost and kept."""
    from kvlink.eval.demo import choose_items, run_demo
    from kvlink.recipe import PRESETS
    from kvlink.show import say_demo

    recipes = recipe or list(PRESETS)
    page_file = report_file(report, reads=(data.partition(":")[2] or data,))
    items = choose_items(data, n, seed, prose, note)
    with progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("asking", total=len(items) * len(recipes))
        found = run(run_demo(items, model, seed=seed, recipes=recipes, on_step=lambda: bar.advance(task)))
    if page_file is not None:
        write_story(page_file, found.story)
    told = found.to_dict()
    if as_json:
        say_json(told)
    else:
        say_demo(told)
    if told["failures"]:
        raise typer.Exit(1)


def ask(
    question: Question,
    context: Ctx = "",
    handle: Annotated[str, option("handle", Text(), "A published context instead of --context.")] = "",
    recipe: Recipe = "",
    budget: Budget = None,
    bits: Bits = None,
    quality: Quality = None,
    verify: Verify = False,
    deadline: Deadline = None,
    allow_text: AllowText = False,
    sender_at: SenderAt = SENDER,
    receiver_at: ReceiverAt = RECEIVER,
    creds: Creds = None,
    insecure: Insecure = False,
    timeout_s: Timeout = CALL_S,
    max_new_tokens: Annotated[
        int, count("max-new-tokens", "Tokens of the answer; 0: the receiver's default.", least=0)
    ] = 0,
    pull: Annotated[
        bool,
        flag("pull", "With --handle: the receiver redeems it itself, keeps what came, and adds to it later."),
    ] = False,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Let the sender deliver what the question needs, and the receiver answer it."""
    from kvlink.transport.api import Delivery
    from kvlink.transport.handle import Handle

    if bool(context) == bool(handle):
        raise errors.ConfigError("give either --context or --handle")
    if report is not None and handle:
        raise errors.ConfigError("a report shows the context: give --context, a handle does not open it")
    if pull and not handle:
        raise errors.ConfigError("--pull goes with --handle: a receiver pulls what a sender holds")
    page_file = report_file(report, reads=(context,))
    at = Handle.parse(handle) if handle else Handle(sender_at, "")
    delivery = Delivery(
        receiver=receiver_at,
        question=question,
        recipe=recipe,
        context_id=at.context_id,
        text=read_context(context) if context else "",
        target=target_of(budget, bits, quality, verify, deadline, allow_text),
        answer_here=True,
        explain=report is not None,
    )
    link = {"credentials": credentials(creds, insecure), "insecure": insecure, "timeout_s": timeout_s}
    if pull:
        run(_pull(delivery, handle, link, max_new_tokens, as_json))
        return
    run(_ask(delivery, at.address, link, max_new_tokens, as_json, page_file))


def report_file(file: Path | None, reads: Iterable[str]) -> Output | None:
    """Where the report goes; refused before anything runs where it cannot be made or written."""
    from kvlink import page

    if file is None:
        return None
    page.require()
    return Output(file, reads)


def write_story(file: Output, story: dict[str, Any]) -> None:
    from kvlink import page
    from kvlink.page.story import Story

    file.write(page.story_page(Story(**story)).encode(errors="backslashreplace"))


async def _ask(
    delivery: Any,
    sender_at: str,
    link: dict[str, Any],
    max_new_tokens: int,
    as_json: bool,
    report: Output | None,
) -> None:
    from kvlink.agent.handshake import Needed, require_room
    from kvlink.show import receipt_dict, say_receipt
    from kvlink.transport.api import Ask
    from kvlink.transport.client import ReceiverClient, SenderClient

    done = None
    async with SenderClient(sender_at, **link) as source, ReceiverClient(delivery.receiver, **link) as target:
        require_room(await target.capabilities(), Needed(new_tokens=max_new_tokens))
        with progress(BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("delivering", total=None)
            async for step in source.deliver(delivery):
                bar.update(task, completed=step.sent_bytes, total=step.total_bytes)
                done = step
        if done is None or not done.done:
            raise errors.PeerUnavailableError(f"{sender_at}: the delivery ended without a result")
        text, last = await _answer(target, Ask(done.cache_id, delivery.question, max_new_tokens), as_json)
        reader = await target.capabilities()
        await target.delete_cache(done.cache_id)
    receipt = done.receipt.with_stages(**last.receipt.stage_s)
    if report is not None:
        story = {
            "question": delivery.question, "answer": text.strip(), "sender_answer": done.sender_answer,
            "text": delivery.text, "receipt": receipt, "told": done.explanation,
            "reads_tokens_per_s": reader.prefill_tokens_per_s,
        }  # fmt: skip
        write_story(report, story)
    warn(receipt.recipe)
    if as_json:
        told = {
            "mode": "text" if receipt.is_text else "kv",
            "recipe": delivery.recipe or receipt.recipe,
            "answer": text.strip(),
            "sender_answer": done.sender_answer,
            "agrees": text.strip() == done.sender_answer,
            "ttft_s": sum(s for name, s in receipt.stage_s.items() if name not in ("prefill", "generate")),
        }
        say_json({**told, **receipt_dict(receipt)})
        return
    say("")
    say(f"the sender itself: {done.sender_answer}")
    say("")
    say_receipt(receipt)
    if not receipt.is_text and delivery.text:
        _say_break_even(receipt, len(delivery.text.encode()), reader.prefill_tokens_per_s)


async def _answer(target: Any, ask: Any, as_json: bool) -> tuple[str, Any]:
    """Ask a receiver and print the answer as it comes; its text, and the last piece."""
    text, last = "", None
    async for piece in target.generate(ask):
        if not as_json:
            say_text(piece.text if text else piece.text.lstrip(), end="")
        text += piece.text
        last = piece
    if last is None:
        raise errors.PeerUnavailableError(f"{target.address}: the answer ended before it began")
    return text, last


async def _pull(delivery: Any, handle: str, link: dict[str, Any], max_new_tokens: int, as_json: bool) -> None:
    """Let the receiver redeem the handle and answer."""
    from kvlink.show import receipt_dict, say_receipt
    from kvlink.transport.api import Ask
    from kvlink.transport.client import ReceiverClient

    asked = Ask(
        "", delivery.question, max_new_tokens, handle=handle, recipe=delivery.recipe, target=delivery.target
    )
    async with ReceiverClient(delivery.receiver, **link) as target:
        text, last = await _answer(target, asked, as_json)
    warn(last.receipt.recipe)
    if as_json:
        say_json({"answer": text.strip(), "cache_id": last.cache_id, **receipt_dict(last.receipt)})
        return
    say("")
    say("")
    say_receipt(last.receipt)


def _say_break_even(receipt: Any, text_bytes: int, tokens_per_s: float) -> None:
    """Whether the text would have been the better choice, and on which links."""
    from kvlink.plan import break_even

    read_s, where = receipt.stage_s.get("prefill", 0.0), "as at the sender"
    if tokens_per_s:
        read_s, where = receipt.context_tokens / tokens_per_s, "as measured at the receiver"
    told = break_even(receipt.wire_bytes, text_bytes, read_s, receipt.stage_s.get("decode", 0.0))
    faster = "on no link" if told.rate_bps is None else f"above {told.rate_bps / 1e6:,.1f} Mbit/s"
    say(f"the cache beats the text {faster}: {told.reason} (reading {where})")
