"""The command that measures: eval.

Does not know: how anything is measured. Place on the path: the face of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from kvlink import errors
from kvlink.cli.common import quiet
from kvlink.cli.kinds import Choice, File, RecipeText, Text
from kvlink.cli.options import Attention, Device, Dtype, Json, count, flag, option
from kvlink.defaults import ATTENTION, DEVICE, DTYPE, MODEL, STUDY_QUESTIONS, STUDY_SEED
from kvlink.files import Output, OutputFolder
from kvlink.quoting import shown
from kvlink.terminal import progress, say, say_json

_TABLES = (
    "selection, quantization, combined, low-rank, spectrum, transfer, methods, masking, rate, second, cut, "
    "overhead, recipes or all"
)

Table = Annotated[str, typer.Argument(help=f"{_TABLES}.")]
Models = Annotated[list[str], option("model", Text(), "Name or directory; repeat for models side by side.")]
Datas = Annotated[
    list[str], option("data", Text(), "generated[:SEED], squad:FILE or trivia:FILE; repeat for several.")
]
Recipes = Annotated[list[str] | None, option("recipe", RecipeText(), "For the table of recipes; repeat.")]
Presses = Annotated[
    list[str] | None, option("press", Text(), "A kvpress class as one more selection; repeat.")
]


def evaluate(
    table: Table,
    model: Models = [MODEL],  # noqa: B006 - typer copies it
    data: Datas = ["generated"],  # noqa: B006
    n: Annotated[int, count("n", "Questions.")] = STUDY_QUESTIONS,
    seed: Annotated[
        int, count("seed", "Of the generator, and of the draw from a file.", least=0)
    ] = STUDY_SEED,
    recipe: Recipes = None,
    press: Presses = None,
    when: Annotated[
        str, option("when", Choice("after", "during", empty=True), "Only cases of that method.")
    ] = "",
    prompt: Annotated[
        str, option("prompt", Choice("auto", "plain"), "auto: the model's chat template.")
    ] = "auto",
    pad_to: Annotated[
        int, count("pad-to", "Tokens a context has at least: other passages pad it.", least=0)
    ] = 0,
    workers: Annotated[int, count("workers", "Processes; 0: one a core.", least=0, most=1024)] = 0,
    out: Annotated[Path, option("out", File(), "Folder of records, rows and the page.")] = Path(
        "kvlink-eval"
    ),
    fresh: Annotated[bool, flag("fresh", "Throw an earlier record away.")] = False,
    record: Annotated[
        list[Path] | None, option("from", File(), "Read a record instead of measuring; repeat.")
    ] = None,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    as_json: Json = False,
) -> None:
    """Measure one of the study's tables, or all: accuracy against bytes, with intervals.

    A run that is stopped goes on where it was when the same command is given again.
    """
    from kvlink.eval import study
    from kvlink.eval.run import Settings
    from kvlink.show import say_eval

    folder = OutputFolder(out)
    quiet()
    asked = study.Study(table, n, when, tuple(press or ()), tuple(recipe or ()))
    asked.tables()
    base = Settings("", "", seed, pad_to, prompt, device, dtype, attention, workers)
    runs = study.settings_for(table, model, data, base)
    if record:
        report = study.from_records(asked, record)
    else:
        with progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            report = study.evaluate(asked, runs, out, _Bar(bar), fresh=fresh)
    if not report.rows:
        raise errors.ContextError(f"the table {table} has no rows: nothing of it could be measured here")
    written, told = study.write_files(report, folder), report.to_dict()
    page = _write_page(told, folder.file(f"{table}.html"))
    if as_json:
        say_json(told)
        return
    say_eval(told)
    names = ", ".join(str(file) for file in (*written, *([page] if page else ())))
    say(f"written: {names}")
    if page is None:
        say("no page: it needs the extra, pip install 'kvlink[report]'")


class _Bar:
    """A run's progress on the terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, title: str, total: int, done: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(shown(title), total=total, completed=done)

    def step(self) -> None:
        self._bar.advance(self._task)


def _write_page(report: dict[str, Any], file: Output) -> Path | None:
    """The page of a report, where its extra is installed."""
    from kvlink import page

    if not page.available():
        return None
    file.write(page.tables_page(report).encode(errors="backslashreplace"))
    return file.path
