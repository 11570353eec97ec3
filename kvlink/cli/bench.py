"""Commands that put agents under load.

Does not know: how anything is measured. Place on the path: the face of the package.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import BarColumn, TimeRemainingColumn

from kvlink.cli.common import quiet, run
from kvlink.cli.configuration import Command
from kvlink.cli.kinds import Real
from kvlink.cli.options import Json, Model, count, option
from kvlink.defaults import MODEL
from kvlink.terminal import progress, say, say_json

app = typer.Typer(no_args_is_help=True, help="Agents under load.")


@app.callback()
def bench() -> None:
    """Agents under load."""


@app.command(cls=Command)
def load(
    minutes: Annotated[float, option("minutes", Real(0.05, 1e5), "How long.")] = 4.0,
    agents: Annotated[int, count("agents", "Agents at a time.", most=1000)] = 12,
    model: Model = MODEL,
    seed: Annotated[int, count("seed", "Of the contexts.", least=0)] = 0,
    as_json: Json = False,
) -> None:
    """Many agents against one receiver process; every answer is checked against its own context.

    Exit code 1 where an answer was lost or mixed up.
    """
    from kvlink.eval.load import cores, run_load

    quiet()
    with progress(BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("load", total=60 * minutes)
        found = run(run_load(minutes, agents, model, seed, on_second=lambda: bar.advance(task)))
    told: dict[str, Any] = {"model": model, "seed": seed, "cores": cores(), **found.to_dict()}
    if as_json:
        say_json(told)
    else:
        _say(told)
    if told["answers_lost"] or told["answers_mixed"]:
        raise typer.Exit(1)


def _say(told: dict[str, Any]) -> None:
    few, many = told["answers_of_an_agent"]
    say(
        f"{told['agents']} agents, {told['minutes']:g} min, {told['model']}, seed {told['seed']}, "
        f"{told['cores']} cores: {told['answers']} answers"
    )
    say(
        f"lost {told['answers_lost']}, mixed up {told['answers_mixed']}, of no context {told['answers_other']}, "
        f"told to come again {told['busy']}"
    )
    for name, what in (("push_ms", "push"), ("first_token_ms", "first token"), ("total_ms", "whole answer")):
        say(f"{what:12} " + ", ".join(f"{share} {ms:,.0f} ms" for share, ms in told[name].items()))
    say(f"answers of an agent: {few} to {many}")
    before, after = told["rss_before_bytes"] / 1e6, told["rss_after_bytes"] / 1e6
    say(f"receiver's memory: {before:,.0f} MB after warm-up, {after:,.0f} MB at the end")
    for error in told["errors"]:
        say(error)
