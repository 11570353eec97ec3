"""What the commands share: options, input, the console.

Does not know: what a command does. Place on the path: the face of the package.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress

from kvlink import errors

T = TypeVar("T")

SENDER, RECEIVER = "127.0.0.1:50051", "127.0.0.1:50052"

Model = Annotated[str, typer.Option(help="Model name or directory; kvlink-tiny is built in.")]
Data = Annotated[str, typer.Option(help="generated[:SEED], squad:FILE or trivia:FILE.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Attn = Annotated[str, typer.Option(help="Attention implementation: auto, sdpa, eager, …")]
Json = Annotated[bool, typer.Option("--json", help="Data instead of text, on standard output.")]
Ctx = Annotated[str, typer.Option("--context", help="File with the context, or - for standard input.")]
Question = Annotated[str, typer.Option(help="The question.")]
RecipeText = Annotated[str, typer.Option(help="How the cache is reduced, such as 'q2c+draft@0.25 int4'.")]
ReportFile = Annotated[Path | None, typer.Option(help="Write the story of a transfer as an HTML page.")]
Budget = Annotated[str, typer.Option(help="Bytes for the whole transfer, such as 200kB; sets the retention.")]
Bits = Annotated[
    float, typer.Option("--bits", min=0, help="Most bits per element; sets the step of a transform.")
]
Quality = Annotated[
    float, typer.Option(min=0, max=1, help="Share of answers to keep, by the model's profile; sets the step.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the message before it leaves; make it finer until it passes.")
]
SenderAt = Annotated[str, typer.Option("--sender", help="Address of the sender.")]
ReceiverAt = Annotated[str, typer.Option("--receiver", help="Address of the receiver.")]
Listen = Annotated[str, typer.Option(help="host:port to listen on; port 0 picks one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen off loopback without encryption.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that tables in files keep their columns."""
    plain = Console(soft_wrap=True)
    return plain if plain.is_terminal else Console(soft_wrap=True, width=170)


def progress_bar(*columns: Any) -> Progress:
    """A bar on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def read_context(path: str) -> str:
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


def budget_bytes(text: str) -> int:
    from kvlink.recipe import Amount

    if not text:
        return 0
    amount = Amount.parse(text)
    if amount.unit != "bytes":
        raise errors.RecipeError(f"a budget is in bytes, such as 200kB or 1.5MB, got {text!r}")
    return int(amount.value)


def wish(budget: str, bits: float, quality: float, verify: bool) -> Any:
    from kvlink.recipe import Wish

    return Wish(budget_bytes(budget), bits, quality, verify)


def checked_recipe(text: str) -> str:
    """The recipe as it was given, once it can be read: refused before anybody is dialled."""
    from kvlink.recipe import Recipe

    if text and text != "auto":
        Recipe.parse(text)
    return text


def quiet() -> None:
    """Libraries keep their notes to themselves; standard output belongs to the result."""
    import transformers

    transformers.utils.logging.set_verbosity_error()


def set_up_log(level: str) -> None:
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise errors.ConfigError(f"log level must be debug, info, warning or error, got {level!r}")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def open_file(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise errors.ContextError(f"cannot read {file}: {error.strerror}") from error
