"""The `kvlink` command.

Every option can also be set as `KVLINK_<COMMAND>_<OPTION>` in the environment, or in a TOML file
given with `--config` (a table per command). Flags win over the environment, that over the file.

Exit codes: 0 done · 1 a check failed · 2 bad input · 3 model or identity · 4 link or peer ·
5 damaged or unexpected data · 6 a limit, an unknown id, or not allowed.

Does not know: how anything is done. Place on the path: outside it; imports lazily, so that
`kvlink --help` needs no torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tomllib
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvlink import errors
from kvlink._release import RELEASE

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
T = TypeVar("T")

SENDER, RECEIVER = "127.0.0.1:50051", "127.0.0.1:50052"
EXIT_CODES: dict[type[errors.KvlinkError], int] = {
    errors.InputError: 2,
    errors.ModelError: 3,
    errors.IdentityError: 3,
    errors.TransportError: 4,
    errors.DataError: 5,
    errors.ProtocolError: 5,
    errors.LimitError: 6,
    errors.NotFoundError: 6,
    errors.AccessError: 6,
}

Model = Annotated[str, typer.Option(help="Model name or directory; kvlink-tiny is built in.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Attn = Annotated[str, typer.Option(help="Attention implementation: auto, sdpa, eager, …")]
Json = Annotated[bool, typer.Option("--json", help="Data instead of text, on standard output.")]
Ctx = Annotated[str, typer.Option("--context", help="File with the context, or - for standard input.")]
Question = Annotated[str, typer.Option(help="The question.")]
RecipeText = Annotated[str, typer.Option(help="How the cache is reduced, such as 'q2c+draft@0.25 int4'.")]
Budget = Annotated[str, typer.Option(help="Bytes for the whole transfer, such as 200kB; sets the retention.")]
SenderAt = Annotated[str, typer.Option("--sender", help="Address of the sender.")]
ReceiverAt = Annotated[str, typer.Option("--receiver", help="Address of the receiver.")]
Listen = Annotated[str, typer.Option(help="host:port to listen on; port 0 picks one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen off loopback without encryption.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with a table per command.")] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the release and stop.")] = False,
) -> None:
    """One agent hands over what it has read: selected, compressed KV caches over gRPC."""
    if version:
        print(f"kvlink {RELEASE}")
        raise typer.Exit
    if config is not None:
        try:
            loaded = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigError(f"cannot read the configuration {config}: {error}") from error
        context.default_map = {
            command: {name.replace("-", "_"): value for name, value in table.items()}
            for command, table in loaded.items()
            if isinstance(table, dict)
        }


def main() -> None:
    """Run the command; errors of the package become a line on standard error and an exit code."""
    try:
        app(auto_envvar_prefix="KVLINK")
    except errors.KvlinkError as error:
        print(f"kvlink: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


def exit_code(error: errors.KvlinkError) -> int:
    return next((code for cls, code in EXIT_CODES.items() if isinstance(error, cls)), 1)


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def _console() -> Console:
    return Console(soft_wrap=True)


def _progress(*columns: Any) -> Progress:
    """A bar on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _read_context(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise errors.ContextError(f"cannot read the context {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.ContextError(
            f"the context {path} is not UTF-8: byte {data[error.start]:#04x} at {error.start}"
        ) from error
    if not text.strip():
        raise errors.ContextError(f"the context {path} is empty: nothing to read")
    return text


def _budget(text: str) -> int:
    from kvlink.recipe import Amount

    if not text:
        return 0
    amount = Amount.parse(text)
    if amount.unit != "bytes":
        raise errors.RecipeError(f"a budget is in bytes, such as 200kB or 1.5MB, got {text!r}")
    return int(amount.value)


def _quiet() -> None:
    """Libraries keep their notes to themselves; standard output belongs to the result."""
    import transformers

    transformers.utils.logging.set_verbosity_error()


def _log(level: str) -> None:
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise errors.ConfigError(f"log level must be debug, info, warning or error, got {level!r}")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command()
def demo(
    model: Model = "kvlink-tiny",
    data: Annotated[Path | None, typer.Option(help="SQuAD-format JSON instead of generated passages.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Generated questions, or questions of the file.")] = 20,
    seed: int = 7,
    as_json: Json = False,
) -> None:
    """Start two agents on loopback, ask questions by each recipe, print what it cost and kept."""
    from kvlink.eval.demo import choose_items, run_demo
    from kvlink.recipe import PRESETS
    from kvlink.show import print_demo, print_json

    items = choose_items(data, n, seed)
    with _progress(TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("asking", total=len(items) * len(PRESETS))
        report = _run(run_demo(items, model, seed=seed, on_step=lambda: bar.advance(task))).to_dict()
    if as_json:
        print_json(report)
    else:
        print_demo(_console(), report)
    if report["failures"]:
        raise typer.Exit(1)


@app.command()
def receiver(
    listen: Listen = RECEIVER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    insecure: Insecure = False,
    max_held: Annotated[str, typer.Option(help="Memory for held caches.")] = "8000MB",
    cache_lifetime_s: Annotated[float, typer.Option(help="Seconds that a cache is held.")] = 3600.0,
    max_transfers: Annotated[int, typer.Option(min=1, help="Transfers at a time.")] = 32,
    log_level: LogLevel = "warning",
) -> None:
    """Run a receiver: it takes caches and answers from them."""
    from kvlink.agent.receiver import Receiver
    from kvlink.agent.receiver_service import ReceiverService, ReceiverSettings
    from kvlink.transport.server import Server, check_listen

    _log(log_level)
    _quiet()
    settings = ReceiverSettings(
        max_held_bytes=_budget(max_held), cache_lifetime_s=cache_lifetime_s, max_transfers=max_transfers
    )

    async def serve() -> None:
        # Refuse an address before a model is loaded for it.
        check_listen(listen, insecure)
        service = ReceiverService(Receiver(model, device=device, dtype=dtype, attention=attn), settings)
        await Server(listen, receiver=service, insecure=insecure).run(_announce("receiver", listen, model))

    _run(serve())


@app.command()
def sender(
    listen: Listen = SENDER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    insecure: Insecure = False,
    peer: Annotated[list[str] | None, typer.Option(help="Receiver that may be dialled, host:port; repeat.")] = None,
    max_held: Annotated[str, typer.Option(help="Memory for published contexts.")] = "8000MB",
    context_lifetime_s: Annotated[float, typer.Option(help="Seconds that a context is held.")] = 3600.0,
    log_level: LogLevel = "warning",
) -> None:
    """Run a sender: it reads contexts and delivers what questions need of them."""
    from kvlink.agent.sender import Sender
    from kvlink.agent.sender_service import LOOPBACK_PEERS, SenderService, SenderSettings
    from kvlink.transport.server import Server, check_listen

    _log(log_level)
    _quiet()
    settings = SenderSettings(
        max_held_bytes=_budget(max_held),
        context_lifetime_s=context_lifetime_s,
        peers=tuple(peer) if peer else LOOPBACK_PEERS,
    )

    async def serve() -> None:
        check_listen(listen, insecure)
        service = SenderService(Sender(model, device=device, dtype=dtype, attention=attn), settings)
        await Server(listen, sender=service, insecure=insecure).run(_announce("sender", listen, model))

    _run(serve())


def _announce(kind: str, listen: str, model: str) -> Any:
    host = listen.rpartition(":")[0]
    return lambda port: print(f"kvlink {kind} with {model} listens on {host}:{port}", flush=True)


@app.command()
def ask(
    question: Question,
    context: Ctx = "",
    handle: Annotated[str, typer.Option(help="A published context instead of --context.")] = "",
    recipe: RecipeText = "",
    budget: Budget = "",
    sender_at: SenderAt = SENDER,
    receiver_at: ReceiverAt = RECEIVER,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="0: the receiver's default.")] = 0,
    as_json: Json = False,
) -> None:
    """Let the sender deliver what the question needs, and the receiver answer it."""
    from kvlink.transport.api import Delivery
    from kvlink.transport.handle import Handle

    if bool(context) == bool(handle):
        raise errors.ConfigError("give either --context or --handle")
    at = Handle.parse(handle) if handle else Handle(sender_at, "")
    delivery = Delivery(
        receiver=receiver_at,
        question=question,
        recipe=recipe,
        context_id=at.context_id,
        text=_read_context(context) if context else "",
        budget_bytes=_budget(budget),
        answer_here=True,
    )
    _run(_ask(delivery, at.address, max_new_tokens, as_json))


async def _ask(delivery: Any, sender_at: str, max_new_tokens: int, as_json: bool) -> None:
    from kvlink.plan import break_even
    from kvlink.show import print_json, print_receipt, receipt_dict
    from kvlink.transport.api import Ask
    from kvlink.transport.client import ReceiverClient, SenderClient

    console, done, text = _console(), None, ""
    async with SenderClient(sender_at) as source, ReceiverClient(delivery.receiver) as target:
        with _progress(TextColumn("delivering"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("delivering", total=None)
            async for progress in source.deliver(delivery):
                bar.update(task, completed=progress.sent_bytes, total=progress.total_bytes)
                done = progress
        if done is None or not done.done:
            raise errors.PeerUnavailableError(f"{sender_at}: the delivery ended without a result")
        async for piece in target.generate(Ask(done.cache_id, delivery.question, max_new_tokens)):
            if not as_json:
                console.print(piece.text if text else piece.text.lstrip(), end="", markup=False, highlight=False)
            text += piece.text
            last = piece
        reader = await target.capabilities()
        await target.delete_cache(done.cache_id)
    receipt = done.receipt.with_stages(**last.receipt.stage_s)
    if as_json:
        own = {"answer": text.strip(), "sender_answer": done.sender_answer}
        print_json({**own, "agrees": text.strip() == done.sender_answer, **receipt_dict(receipt)})
        return
    console.print(f"\n[dim]the sender itself:[/] {done.sender_answer}\n", highlight=False)
    print_receipt(console, receipt)
    rate = reader.prefill_tokens_per_s
    if receipt.kept_tokens and delivery.text and rate:
        read_s = receipt.context_tokens / rate
        told = break_even(
            receipt.wire_bytes, len(delivery.text.encode()), read_s, receipt.stage_s.get("decode", 0.0)
        )
        faster = "never" if told.rate_bps is None else f"above {told.rate_bps / 1e6:,.1f} Mbit/s"
        console.print(f"the cache beats the text {faster}: {told.reason}", highlight=False)


@app.command()
def publish(
    context: Ctx,
    sender_at: SenderAt = SENDER,
    lifetime_s: Annotated[int, typer.Option(min=0, help="0: the sender's default.")] = 0,
    as_json: Json = False,
) -> None:
    """Let a sender read a context and hold it; prints its handle."""
    from kvlink.show import print_json
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle

    text = _read_context(context)

    async def work() -> Any:
        async with SenderClient(sender_at) as source:
            return await source.publish(text, lifetime_s)

    done = _run(work())
    handle = str(Handle(sender_at, done.context_id))
    if as_json:
        print_json({
            "handle": handle,
            "context_tokens": done.context_tokens,
            "cache_bytes": done.cache_bytes,
            "lifetime_s": done.lifetime_s,
            "stage_s": {"prefill": done.prefill_s},
        })
    else:
        print(handle)
        note = f"{done.context_tokens} tokens, {done.cache_bytes:,} bytes of cache, read in {done.prefill_s * 1e3:.0f} ms"
        print(f"{note}; held for {done.lifetime_s} s", file=sys.stderr)


@app.command()
def unpublish(handle: str) -> None:
    """Let the sender forget a published context."""
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle

    at = Handle.parse(handle)

    async def work() -> None:
        async with SenderClient(at.address) as source:
            await source.unpublish(at.context_id)

    _run(work())


@app.command()
def fetch(
    handle: str,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .kvl file to write.")],
    question: Annotated[str, typer.Option(help="The question that the selection serves.")] = "",
    recipe: RecipeText = "",
    budget: Budget = "",
    as_json: Json = False,
) -> None:
    """Pull a published context, reduced for a question, into a .kvl file."""
    from kvlink.transport.client import SenderClient
    from kvlink.transport.handle import Handle
    from kvlink.wire.file import write_frames

    at = Handle.parse(handle)

    async def work() -> list[bytes]:
        async with SenderClient(at.address) as source:
            return [f async for f in source.fetch(at.context_id, question, recipe, _budget(budget))]

    frames = _run(work())
    with out.open("wb") as target:
        count = write_frames(frames, target)
    _wrote(out, count, as_json, {"frames": len(frames)})


@app.command()
def pack(
    context: Ctx,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .kvl file to write.")],
    question: Annotated[str, typer.Option(help="The question that the selection serves.")] = "",
    recipe: RecipeText = "int8",
    budget: Budget = "",
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    as_json: Json = False,
) -> None:
    """Read a context here and keep the transfer as a .kvl file."""
    from kvlink.recipe import Recipe
    from kvlink.show import receipt_dict

    parsed, text = Recipe.parse(recipe), _read_context(context)
    from kvlink.agent.sender import Sender

    _quiet()
    source = Sender(model, device=device, dtype=dtype, attention=attn)
    transfer = source.pack(source.read(text), question, parsed, _budget(budget))
    with out.open("wb") as target:
        count = transfer.write(target)
    _wrote(out, count, as_json, receipt_dict(transfer.receipt))


def _wrote(out: Path, count: int, as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps({"file": str(out), "file_bytes": count, **more}, indent=2))
    else:
        print(f"{out}: {count:,} bytes")


@app.command()
def unpack(
    file: Path,
    question: Question,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    as_json: Json = False,
) -> None:
    """Answer a question from a .kvl file."""
    from kvlink.agent.receiver import Receiver
    from kvlink.show import print_json, receipt_dict

    _quiet()
    with _open(file) as stream:
        target = Receiver(model, device=device, dtype=dtype, attention=attn)
        held = target.read_file(stream)
    told = target.answer(held, question, max_new_tokens=max_new_tokens)
    if as_json:
        receipt = held.receipt.with_stages(first_token=told.first_token_s)
        print_json({"answer": told.text, **receipt_dict(receipt)})
    else:
        print(told.text)


@app.command()
def inspect(file: Path, as_json: Json = False) -> None:
    """Say what a .kvl file holds; checks every checksum and digest, needs no model."""
    from kvlink.show import print_json
    from kvlink.wire.inspect import describe

    with _open(file) as stream:
        told = describe(stream)
    if as_json:
        print_json(told)
        return
    for name, value in told.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:18} {shown}")


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise errors.ContextError(f"cannot read {file}: {error.strerror}") from error


@app.command()
def health(
    address: str,
    as_json: Json = False,
) -> None:
    """Ask an agent whether it serves, and what it is."""
    from kvlink.show import print_json
    from kvlink.transport.client import ReceiverClient, SenderClient

    async def work() -> dict[str, Any]:
        for kind, client in (("receiver", ReceiverClient), ("sender", SenderClient)):
            async with client(address) as peer:
                status = await peer.health()
                try:
                    there = await peer.capabilities()
                except errors.RemoteProtocolError:
                    continue
                return {
                    "address": address,
                    "agent": kind,
                    "status": status,
                    "model": there.model_name,
                    "dtype": there.dtype,
                    "release": there.release,
                    "protocol": [there.protocol_min, there.protocol_max],
                    "weights": there.fingerprint.weights.hex(),
                }
        raise errors.RemoteProtocolError(f"{address} is no kvlink agent")

    told = _run(work())
    if as_json:
        print_json(told)
    else:
        print(f"{told['agent']} at {address}: {told['status']}, {told['model']} ({told['dtype']}), kvlink {told['release']}")
    if told["status"] != "SERVING":
        raise typer.Exit(1)
