"""Options that several commands have, each defined once.

Does not know: what a command does with them. Place on the path: above the kinds of values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink.cli.kinds import (
    MOST_COUNT,
    AddressText,
    Choice,
    File,
    Kind,
    Real,
    RecipeText,
    Seconds,
    Size,
    Text,
    Whole,
)
from kvlink.payload import DEADLINE_MS
from kvlink.recipe import Target


def option(name: str, kind: Kind, help: str, *more: str, default: Any = None) -> Any:
    """An option `--name`; `more`: other ways to write it. `default`: shown in help as `kind` shows it."""
    shown = kind.shown(default) if isinstance(kind, Size) and default else True
    return typer.Option(
        f"--{name}", *more, parser=kind, metavar=kind.__name__.upper(), help=help, show_default=shown
    )


def flag(name: str, help: str) -> Any:
    """An option that is said or not, `--name` or `--no-name`."""
    return typer.Option(f"--{name}/--no-{name}", help=help)


Model = Annotated[str, option("model", Text(), "Model name or directory; kvlink-tiny is built in.")]
Data = Annotated[str, option("data", Text(), "generated[:SEED], squad:FILE or trivia:FILE.")]
Device = Annotated[str, option("device", Text(), "cpu, cuda, cuda:1, …")]
Dtype = Annotated[
    str,
    option("dtype", Choice("auto", "bfloat16", "float16", "float32"), "Numbers that the model computes in."),
]
Attention = Annotated[str, option("attention", Text(), "Attention implementation: auto, sdpa, eager, …")]
TemplateOptions = Annotated[
    str,
    option(
        "template-options",
        Text(),
        'What the model\'s chat template is given, as a JSON object: {"enable_thinking": false}. Both ends the same.',
    ),
]
Json = Annotated[bool, flag("json", "Data instead of text, on standard output.")]
Ctx = Annotated[str, option("context", Text("path"), "File with the context, or - for standard input.")]
Question = Annotated[str, option("question", Text(), "The question.")]
Recipe = Annotated[
    str, option("recipe", RecipeText(empty=True), "How the cache is reduced, such as 'q2c+draft@0.25 int4'.")
]
ReportFile = Annotated[
    Path | None, option("report", File(), "Write the story of a transfer as an HTML page.")
]
Budget = Annotated[
    int | None,
    option("budget", Size(), "Bytes for the whole transfer; positions are chosen where not all fit."),
]
Bits = Annotated[
    float | None,
    option("bits", Real(most=64, above=True), "Most bits per element; sets the step of a transform."),
]
Quality = Annotated[
    float | None,
    option(
        "quality",
        Real(most=1, above=True),
        "Share of answers to keep, by the model's profile; sets the step.",
    ),
]
Verify = Annotated[bool, flag("verify", "Check the message before it leaves; make it finer until it passes.")]
Deadline = Annotated[
    float | None,
    option(
        "deadline",
        Real(most=DEADLINE_MS / 1e3, above=True),
        "Seconds after which what has come is enough; positions come in order of importance.",
    ),
]
AllowText = Annotated[
    bool, flag("allow-text", "With --deadline: where nothing can be used by then, the text comes instead.")
]
SenderAt = Annotated[str, option("sender", AddressText(), "Address of the sender.")]
ReceiverAt = Annotated[str, option("receiver", AddressText(), "Address of the receiver.")]
Listen = Annotated[
    str, option("listen", AddressText(listening=True), "host:port to listen on; port 0 picks one.")
]
Insecure = Annotated[bool, flag("insecure", "Listen and dial off loopback without encryption.")]
Creds = Annotated[
    Path | None, option("credentials", File(), "Folder with certificate, key and peers.toml: TLS, both ways.")
]
Timeout = Annotated[float, option("timeout-s", Seconds(0.1), "Seconds that a call may take.")]
LogLevel = Annotated[str, option("log-level", Choice("debug", "info", "warning", "error"), "What is logged.")]
LogFormat = Annotated[str, option("log-format", Choice("text", "json"), "json: one object a line.")]
MetricsAt = Annotated[
    str, option("metrics", AddressText(empty=True, listening=True), "host:port that answers GET /metrics.")
]
TraceTo = Annotated[str, option("trace-to", Text("url"), "URL that takes spans: OTLP over HTTP.")]
Out = Annotated[Path, option("out", File(), "The .kvl file to write.", "-o")]
Asked = Annotated[str, option("question", Text(), "The question that the selection serves.")]


def target_of(
    budget: int | None,
    bits: float | None,
    quality: float | None,
    verify: bool,
    deadline: float | None = None,
    allow_text: bool = False,
) -> Target:
    """What these options ask of a transfer. Raises RecipeError."""
    return Target(budget or 0, bits or 0.0, quality or 0.0, verify, deadline or 0.0, allow_text)


def count(name: str, help: str, least: int = 1, most: int = MOST_COUNT) -> Any:
    """An option that is a whole number."""
    return option(name, Whole(least, most), help)
