"""Commands about profiles: build, show, check.

Does not know: what statistics are. Place on the path: the face of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from kvlink.cli.common import quiet
from kvlink.cli.configuration import Command
from kvlink.cli.kinds import File
from kvlink.cli.options import Attention, Data, Device, Dtype, Json, count, option
from kvlink.defaults import ATTENTION, DEVICE, DTYPE
from kvlink.files import Output
from kvlink.quoting import shown
from kvlink.terminal import note, progress, say, say_json
from kvlink.texts import read_bytes

app = typer.Typer(no_args_is_help=True, help="What is known of a model's caches before any message.")

ProfileFile = Annotated[Path, typer.Argument(parser=File(), metavar="FILE", help="A profile.")]
Which = Annotated[str, typer.Argument(help="Model name or directory.")]


@app.command(cls=Command)
def build(
    model: Which,
    out: Annotated[
        Path, option("out", File(), "The file; named kvlink.profile beside a model it is used.", "-o")
    ],
    data: Data = "generated",
    n: Annotated[int, count("n", "Contexts for the statistics.")] = 40,
    checks: Annotated[int, count("checks", "Questions that measure what each step keeps.", least=0)] = 100,
    seed: Annotated[int, count("seed", "Of the generator, and of the draw from a file.", least=0)] = 1001,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    as_json: Json = False,
) -> None:
    """Read contexts and write a profile: means, basis, spreads, and what each step keeps."""
    from dataclasses import replace

    from kvlink.eval.profiling import make_profile
    from kvlink.eval.questions import load_items
    from kvlink.model.loading import load

    target = Output(out, reads=(model, data.partition(":")[2] or data))
    quiet()
    items = load_items(data, n + checks, seed, note)
    texts, held_out = list(dict.fromkeys(item.context for item in items[:n])), items[n:]
    lm = replace(load(model, device=device, dtype=dtype, attention=attention), profile=None)
    with progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("reading", total=len(texts) + len(held_out))
        made = make_profile(lm, texts, held_out, lambda: bar.advance(task))
    size = target.write(made.to_bytes())
    if not target.is_standard_output:
        _tell(made, size, as_json)


@app.command(cls=Command)
def show(file: ProfileFile, as_json: Json = False) -> None:
    """Say what a profile holds and whose it is."""
    data = _read(file)
    _tell(_parse(data), len(data), as_json)


@app.command(cls=Command)
def check(
    file: ProfileFile, model: Which, device: Device = DEVICE, dtype: Dtype = DTYPE, as_json: Json = False
) -> None:
    """Whether a profile belongs to a model; exit 3 where it does not."""
    from kvlink.model.loading import load

    quiet()
    data = _read(file)
    profile = _parse(data)
    profile.require_match(load(model, device=device, dtype=dtype).fingerprint)
    _tell(profile, len(data), as_json)


def _read(file: Path) -> bytes:
    from kvlink.profile import MAX_BYTES

    return read_bytes(file, "the profile", MAX_BYTES)


def _parse(data: bytes) -> Any:
    from kvlink.profile import Profile

    return Profile.from_bytes(data)


def _tell(profile: Any, size: int, as_json: bool) -> None:
    from kvlink.codecs import step_of

    told = {
        "digest": profile.digest.hex(),
        "bytes": size,
        "layers": len(profile.keys),
        "channels": profile.keys[0].mean.numel(),
        "weights": profile.fingerprint.weights.hex(),
        **profile.about,
        "quality": {f"{step_of(code):.3g}": share for code, share in profile.quality},
    }
    if as_json:
        say_json(told)
        return
    for name, value in told.items():
        figures = ", ".join(f"{k}: {v:.1%}" for k, v in value.items()) if isinstance(value, dict) else value
        say(f"{shown(name):10} {shown(figures)}")
