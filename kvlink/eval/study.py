"""`kvlink eval`: runs over models and data sets, their tables and their files.

Does not know: how a question is measured. Place on the path: outside it; what the command calls.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from kvlink.defaults import STUDY_QUESTIONS
from kvlink.errors import ConfigError, ContextError
from kvlink.eval import overhead
from kvlink.eval import record as records
from kvlink.eval.items import Item
from kvlink.eval.questions import load_items
from kvlink.eval.record import Record
from kvlink.eval.results import rows_of, to_csv, to_json, to_jsonl
from kvlink.eval.rows import Row
from kvlink.eval.run import Settings, open_model, run
from kvlink.eval.tables import Case, plan
from kvlink.files import OutputFolder
from kvlink.selection import PRESS


class Progress(Protocol):
    """Somebody who watches: a bar with a time left, or nobody."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Study:
    """What is asked for: a table, questions, selections beside the ones that are always there."""

    table: str
    n: int = STUDY_QUESTIONS
    when: str = ""
    presses: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()

    def tables(self) -> dict[str, list[Case]]:
        """Cases by table. Raises ConfigError for an unknown table or option, RecipeError."""
        return plan(self.table, [PRESS + name for name in self.presses], self.recipes, self.when)

    @property
    def with_overhead(self) -> bool:
        return self.table in ("overhead", "all")


@dataclass(slots=True)
class Report:
    """The rows of all runs, what each run was, and notes on what could not be measured."""

    table: str
    rows: list[Row] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return to_json(self.rows, table=self.table, runs=self.runs, notes=self.notes)


def evaluate(
    study: Study, runs: Sequence[Settings], folder: Path, progress: Progress, *, fresh: bool = False
) -> Report:
    """Measure every run and sum up. All input is read and checked before the first model computes.

    Writes into `folder`, by run: NAME.record.jsonl, a line a question; it lets a run that was
    stopped go on. Raises what the data, the models and the table's options raise.
    """
    tables = study.tables()
    notes: dict[str, None] = {}
    data = [load_items(settings.data, study.n, settings.seed, notes.setdefault) for settings in runs]
    if len(runs) > 1:
        for settings in runs:  # a run of hours must not end at the second model's name
            open_model(settings)
    report = Report(study.table, notes=list(notes))
    for settings, items in zip(runs, data, strict=True):
        began = time.monotonic()
        if tables:
            record = _measured(study, settings, items, tables, folder, progress, fresh)
            _add(report, record, tables)
        if study.with_overhead:
            _add_overhead(study, report, settings, items, progress)
        if report.runs:
            report.runs[-1]["seconds"] = time.monotonic() - began
    return report


def from_records(study: Study, files: Sequence[Path]) -> Report:
    """The tables of records that were written before, without measuring anything."""
    report, tables = Report(study.table), study.tables()
    for file in files:
        record = records.read(file)
        wanted = _cases(tables, record.header["variant"])
        missing = {case.key for case in wanted} - set(record.header["cases"])
        if missing:
            raise ConfigError(f"{file} lacks {len(missing)} cases of {study.table}, such as {min(missing)}")
        if len(record.lines) < record.header["items"]:
            report.notes.append(f"{file} is not finished: {len(record.lines)} of {record.header['items']}")
        _add(report, record, tables)
    if study.with_overhead:
        report.notes.append("records hold no overhead: kvlink eval overhead measures it")
    return report


def write_files(report: Report, folder: OutputFolder) -> list[Path]:
    """The rows as CSV and JSON lines, beside the records."""
    out = []
    for suffix, text in (("csv", to_csv(report.rows)), ("jsonl", to_jsonl(report.rows))):
        file = folder.file(f"{report.table}.{suffix}")
        file.write(text.encode(errors="backslashreplace"))
        out.append(file.path)
    return out


def record_file(study: Study, settings: Settings, folder: Path) -> Path:
    """Where the lines of a run are written: a name that tells what it measured."""
    words = [study.table, Path(settings.model).name, settings.data.replace(":", "-").rsplit("/", 1)[-1]]
    words += [f"n{study.n}", f"seed{settings.seed}"]
    words += [settings.variant] if settings.variant != "plain" else []
    words += [f"pad{settings.pad_to}"] if settings.pad_to else []
    words += [study.when] if study.when else []
    return folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words)) + ".record.jsonl")


def _measured(
    study: Study, settings: Settings, items: Sequence[Item], tables: dict[str, list[Case]], folder: Path,
    progress: Progress, fresh: bool,
) -> Record:  # fmt: skip
    cases = _cases(tables, settings.variant)
    title = f"{settings.model}, {settings.data}"
    return run(
        settings, items, cases, record_file(study, settings, folder), fresh=fresh,
        on_start=lambda done: progress.start(title, len(items), done), on_item=progress.step,
    )  # fmt: skip


def _cases(tables: dict[str, list[Case]], variant: str) -> list[Case]:
    """Every case once. The biased variant is there to see what constants in keys do to codecs."""
    cases = list(dict.fromkeys(case for found in tables.values() for case in found))
    if variant == "biased":
        return [case for case in cases if case.shift == "same" and "@" not in case.recipe]
    return cases


def _add(report: Report, record: Record, tables: dict[str, list[Case]]) -> None:
    rows = rows_of(record, tables)
    lines, header = record.measured(), record.header
    if not lines:
        why = next(iter(record.skipped.values()), "it is empty")
        raise ContextError(f"{header['model']}, {header['data']}: no question was measured: {why}")
    report.rows += rows
    report.runs.append(
        {
            **{
                name: header[name]
                for name in ("model", "data", "seed", "dtype", "prompt", "pad_to", "release", "variant")
            },
            "n": len(lines),
            "context_tokens": statistics.fmean(line["context_tokens"] for line in lines),
            "f1_full": next(
                (r.f1_full for r in rows if r.question_shift == "same" and r.f1_full is not None), None
            ),
            "weights": header["weights"],
            "data_digest": header["data_digest"],
        }
    )
    skipped = record.skipped
    if skipped:
        first = next(iter(skipped.values()))
        report.notes.append(
            f"{header['model']}, {header['data']}: {len(skipped)} questions left out: {first}"
        )


def _add_overhead(
    study: Study, report: Report, settings: Settings, items: Sequence[Item], progress: Progress
) -> None:
    lm = open_model(settings)
    known = {"model": settings.model, "data": settings.data, "seed": settings.seed}
    progress.start(f"{settings.model}, overhead", overhead.steps(), 0)
    rows, notes = overhead.measure(lm, items[:40], known, progress.step)
    report.rows += rows
    report.notes += notes
    if study.table == "overhead" and rows:  # no run of questions has said what this is
        tokens = statistics.fmean(row.context_tokens or 0 for row in rows)
        report.runs.append({**known, "n": len(rows), "context_tokens": tokens, "f1_full": None})


def settings_for(table: str, models: Sequence[str], data: Sequence[str], base: Settings) -> list[Settings]:
    """A run for each model on each data set; the table of rates also with biased keys."""
    variants = ("plain", "biased") if table == "rate" else ("plain",)
    return [
        replace(base, model=model, data=name, variant=variant)
        for model in models
        for name in data
        for variant in variants
    ]
