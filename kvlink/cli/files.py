"""Commands around published contexts and `.kvl` files.

Does not know: what a frame says. Place on the path: the face of the package.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink.cli.common import credentials, is_said, open_file, quiet, read_context, run, warn
from kvlink.cli.kinds import File, Text
from kvlink.cli.options import (
    AllowText,
    Asked,
    Attention,
    Bits,
    Budget,
    Creds,
    Ctx,
    Deadline,
    Device,
    Dtype,
    Insecure,
    Json,
    Model,
    Out,
    Quality,
    Question,
    Recipe,
    SenderAt,
    TemplateOptions,
    Verify,
    count,
    flag,
    option,
    target_of,
)
from kvlink.defaults import ATTENTION, DEVICE, DTYPE, MODEL, NEW_TOKENS, SENDER
from kvlink.files import Output
from kvlink.quoting import shown
from kvlink.receipt import Spoken, warnings_of
from kvlink.recipe import DEFAULT_RECIPE
from kvlink.terminal import note, say, say_json, say_text

KvlFile = Annotated[Path, typer.Argument(parser=File(), metavar="FILE", help="A .kvl file.")]
BaseFile = Annotated[
    Path | None,
    option("base", File(), ".kvl file of this context that you have: only what is missing in it is pulled."),
]
HandleText = Annotated[str, typer.Argument(metavar="HANDLE", help="What 'kvlink publish' printed.")]


def publish(
    ctx: typer.Context,
    context: Ctx,
    sender_at: SenderAt = SENDER,
    lifetime_s: Annotated[int, count("lifetime-s", "Seconds; 0: the sender's default.", least=0)] = 0,
    readers: Annotated[
        list[str] | None, option("for", Text("name"), "Peer that may use the handle too; repeat.")
    ] = None,
    extends: Annotated[
        str, option("extends", Text(), "Handle of a context that the text goes behind; it alone is read.")
    ] = "",
    creds: Creds = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Let a sender read a context and hold it; prints its handle."""
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle

    text, proof = read_context(context), credentials(creds, insecure)
    named = is_said(ctx, "sender_at") or bool(extends)
    before = Handle.parse(extends) if extends else Handle(sender_at, "")
    sender_at = before.address

    async def work() -> tuple[Any, str]:
        async with SenderClient(sender_at, proof, insecure=insecure) as source:
            # Who named an address knows a way to the sender; else the sender's own word is the better one.
            said = "" if named else (await source.capabilities()).address
            done = await source.publish(text, lifetime_s, readers=readers or (), extends=before.context_id)
            return done, said or sender_at

    done, reached_at = run(work())
    handle = str(Handle(reached_at, done.context_id))
    if as_json:
        say_json(
            {
                "handle": handle,
                "context_tokens": done.context_tokens,
                "cache_bytes": done.cache_bytes,
                "lifetime_s": done.lifetime_s,
                "stage_s": {"prefill": done.prefill_s},
            }
        )
    else:
        say(handle)
        told = f"{done.context_tokens} tokens, {done.cache_bytes:,} bytes of cache, read in {done.prefill_s * 1e3:.0f} ms"
        note(f"{told}; held for {done.lifetime_s} s")


def unpublish(handle: HandleText, creds: Creds = None, insecure: Insecure = False) -> None:
    """Let the sender forget a published context."""
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle

    at, proof = Handle.parse(handle), credentials(creds, insecure)

    async def work() -> None:
        async with SenderClient(at.address, proof, insecure=insecure) as source:
            await source.unpublish(at.context_id)

    run(work())


def fetch(
    handle: HandleText,
    out: Out,
    question: Asked = "",
    recipe: Recipe = "",
    budget: Budget = None,
    bits: Bits = None,
    quality: Quality = None,
    verify: Verify = False,
    deadline: Deadline = None,
    allow_text: AllowText = False,
    base: BaseFile = None,
    creds: Creds = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Pull a published context, reduced for a question, into a .kvl file."""
    from kvlink.agent.handshake import needed_by, require_spoken
    from kvlink.transport.api import Fetch
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle
    from kvlink.wire.file import Writable, framed, write_frames
    from kvlink.wire.inspect import is_end, recipe_of

    target = Output(out)
    at, proof = Handle.parse(handle), credentials(creds, insecure)
    wanted = Fetch(
        at.context_id,
        question,
        recipe,
        target_of(budget, bits, quality, verify, deadline, allow_text),
        base_digest=_digest_of(base) if base else b"",
    )

    async def work(sink: Writable) -> tuple[bytes, bytes, int, int]:
        first, frame, count, size = b"", b"", 0, write_frames((), sink)
        async with SenderClient(at.address, proof, insecure=insecure) as source:
            require_spoken(Spoken(), (await source.capabilities()).spoken, needed_by(recipe))
            async for frame in source.fetch(wanted):
                first, count, size = first or frame, count + 1, size + sink.write(framed(frame))
        return first, frame, count, size

    with target.open() as sink:
        first, last, frames, size = run(work(sink))
    told = recipe_of(first)
    warn(told)
    warnings = {"warnings": found} if (found := list(warnings_of(told))) else {}
    _wrote(target, size, as_json, {"frames": frames, "whole": is_end(last), **warnings})
    if not is_end(last):
        note(
            "kvlink: the deadline came before the end: 'kvlink unpack --partial' answers from what has closed"
        )


def pack(
    context: Ctx,
    out: Out,
    question: Asked = "",
    recipe: Recipe = DEFAULT_RECIPE,
    budget: Budget = None,
    bits: Bits = None,
    quality: Quality = None,
    verify: Verify = False,
    deadline: Deadline = None,
    model: Model = MODEL,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    template_options: TemplateOptions = "",
    as_json: Json = False,
) -> None:
    """Read a context here and keep the transfer as a .kvl file."""
    from kvlink.show import receipt_dict, say_certificate

    output = Output(out, reads=(context, model))
    text = read_context(context)
    target = target_of(budget, bits, quality, verify, deadline)
    from kvlink.agent.sender import Sender

    quiet()
    source = Sender(model, device=device, dtype=dtype, attention=attention, template_options=template_options)
    asked = source.recipe(
        recipe, target
    )  # a recipe that this model cannot serve is refused before the reading
    transfer = source.pack(source.read(text), question, asked, target)
    with output.open() as sink:
        count = transfer.write(sink)
    _wrote(output, count, as_json, receipt_dict(transfer.receipt))
    warn(transfer.receipt.recipe)
    if not as_json and not output.is_standard_output:
        say_certificate(transfer.receipt)


def _wrote(target: Output, count: int, as_json: bool, more: dict[str, Any]) -> None:
    """Say what was written; nothing where the file itself went to standard output."""
    if target.is_standard_output:
        return
    if as_json:
        say_json({"file": str(target.path), "file_bytes": count, **more})
    else:
        say(f"{shown(target.path)}: {count:,} bytes")


def _digest_of(file: Path) -> bytes:
    """What a receiver holds after the transfer in a file: what a later one can add to."""
    from kvlink.wire.file import read_frames
    from kvlink.wire.session import ReceiveSession

    session = ReceiveSession(keep=False)
    with open_file(file) as stream:
        for frame in read_frames(stream):
            session.receive(frame)
    session.close()
    return session.cache_digest


def unpack(
    file: KvlFile,
    question: Question,
    model: Model = MODEL,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    template_options: TemplateOptions = "",
    max_new_tokens: Annotated[int, count("max-new-tokens", "Tokens of the answer.")] = NEW_TOKENS,
    partial: Annotated[
        bool, flag("partial", "Answer from a file that was cut too, from the segments that have closed.")
    ] = False,
    base: Annotated[
        list[Path] | None,
        option("base", File(), ".kvl file that this one adds to; repeat, each adding to those before."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question from a .kvl file."""
    from kvlink.agent.receiver import Receiver
    from kvlink.show import receipt_dict

    quiet()
    with ExitStack() as files:
        streams = [files.enter_context(open_file(path)) for path in (*(base or ()), file)]
        target = Receiver(
            model, device=device, dtype=dtype, attention=attention, template_options=template_options
        )
        held = None
        for stream in streams[:-1]:
            held = target.read_file(stream, base=held)
        held = target.read_file(streams[-1], partial=partial, base=held)
    told = target.answer(held, question, max_new_tokens=max_new_tokens)
    if as_json:
        receipt = held.receipt.with_stages(first_token=told.first_token_s)
        say_json({"answer": told.text, **receipt_dict(receipt)})
    else:
        say_text(told.text)


def inspect(
    file: KvlFile,
    every_byte: Annotated[bool, flag("bytes", "Every field of every frame.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a .kvl file holds; checks every checksum and digest, needs no model."""
    from kvlink.wire.inspect import describe, listing

    with open_file(file) as stream:
        told = describe(stream)
        if every_byte:
            stream.seek(0)
            for line in listing(stream):
                say(line)
            return
    if as_json:
        say_json(told)
        return
    for name, value in told.items():
        words = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        told_of = ", ".join(words) if isinstance(words, list) else words
        say(f"{name:18} {shown(told_of)}")
