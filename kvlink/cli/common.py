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
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen and dial off loopback without encryption.")
]
Creds = Annotated[
    Path | None,
    typer.Option(
        "--credentials", envvar="KVLINK_CREDENTIALS", help="Folder with certificate, key and peers.toml."
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a call may take.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
LogFormat = Annotated[str, typer.Option(help="text, or json: one object a line.")]
StagingDir = Annotated[
    Path | None, typer.Option("--staging", help="Folder where transfers outlive a restart of the agent.")
]
MetricsAt = Annotated[str, typer.Option("--metrics", help="host:port that answers GET /metrics.")]
TraceTo = Annotated[str, typer.Option("--trace-to", help="URL that takes spans: OTLP over HTTP.")]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


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


def set_up_log(level: str, style: str = "text") -> None:
    from kvlink.observe import JsonLines, TextLines

    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise errors.ConfigError(f"log level must be debug, info, warning or error, got {level!r}")
    if style not in ("text", "json"):
        raise errors.ConfigError(f"log format must be text or json, got {style!r}")
    out = logging.StreamHandler()
    out.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[out])
    # Their notes may show what is none of a log's business.
    for name in ("httpx", "asyncio", "grpc", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def credentials(folder: Path | None, insecure: bool = False) -> Any:
    """The credentials in a folder, or None. Raises ConfigError, CredentialsError."""
    if folder is None:
        return None
    if insecure:
        raise errors.ConfigError("--credentials and --insecure exclude each other")
    from kvlink.transport.credentials import Credentials

    found = Credentials(folder)
    found.check_valid()
    return found


def open_file(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise errors.ContextError(f"cannot read {file}: {error.strerror}") from error
