"""The record of a run: a header, a line a question as it is measured, and an end.

It lets a run that was stopped go on, and tables be made again without measuring; so a file that is not
quite one is refused by the number of its line before anything is summed up.

Does not know: models, processes. Place on the path: between a run and its rows.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvlink.errors import ConfigError, ContextError
from kvlink.eval.rows import Outcome
from kvlink.files import OutputFolder
from kvlink.texts import read_text

MAX_BYTES = 1_000_000_000
_MOST = 2**63
"""No figure of a record is larger."""
_HEADER: dict[str, type] = {
    "model": str, "data": str, "seed": int, "dtype": str, "prompt": str, "pad_to": int, "release": str,
    "variant": str, "weights": str, "data_digest": str, "items": int, "cases": list,
}  # fmt: skip
"""What the sums need of a header; a run keeps all its settings there."""


@dataclass(slots=True)
class Record:
    """What a run found. `lines`: by item, in the items' order. `skipped`: why, by item."""

    header: dict[str, Any]
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[int, str]:
        return {item: line["skipped"] for item, line in sorted(self.lines.items()) if "skipped" in line}

    def measured(self) -> list[dict[str, Any]]:
        """The lines of the questions that were measured, in the items' order."""
        return [line for _, line in sorted(self.lines.items()) if "skipped" not in line]

    def outcomes(self, case: str) -> list[Outcome]:
        """What was found for a case, of all questions that have it."""
        found = (line["outcomes"] for line in self.measured())
        return [Outcome(**outcomes[case]) for outcomes in found if case in outcomes]


def begin(file: Path, record: Record) -> None:
    """Write what is known anew, so that half a line at the end of a broken run is gone; all or nothing."""
    lines = [{"header": record.header}, *record.lines.values()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    OutputFolder(file.parent).file(file.name).write(text.encode())


def add(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a record. Half a line, where the disk is full, is dropped when the run goes on."""
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror}; the same command goes on from there"
        ) from error


def read(file: Path) -> Record:
    """The record that a run wrote, finished or not. Raises ContextError where it is none."""
    lines = read_text(file, "the record", MAX_BYTES).split("\n")
    parsed: list[Any] = []
    for number, text in enumerate(lines, 1):
        try:
            parsed += [json.loads(text)] if text.strip() else []
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ContextError(f"{file}, line {number}: not JSON: {error}") from error
            # The last line of a run that was killed while it wrote.
    header = parsed[0].get("header") if parsed and isinstance(parsed[0], dict) else None
    if not isinstance(header, dict):
        raise ContextError(f"{file} is not the record of a run: no header in its first line")
    odd = [name for name, kind in _HEADER.items() if type(header.get(name)) is not kind]
    if odd or not all(isinstance(case, str) for case in header["cases"]):
        raise ContextError(
            f"{file} is not the record of a run: its header has no {odd[0] if odd else 'cases'}"
        )
    record = Record(header)
    for number, line in enumerate(parsed[1:], 2):
        if isinstance(line, dict) and "finished" in line:
            continue
        if trouble := _trouble(line):
            raise ContextError(f"{file}, line {number}: {trouble}")
        record.lines[line["item"]] = line
    return record


def _trouble(line: Any) -> str:
    """What is wrong with the line of a question; empty where nothing is."""
    if not isinstance(line, dict) or type(line.get("item")) is not int:
        return "not the line of a question: it names no item"
    if isinstance(line.get("skipped"), str):
        return ""
    if type(line.get("context_tokens")) is not int or not isinstance(line.get("outcomes"), dict):
        return "a question without context_tokens and outcomes"
    for case, outcome in line["outcomes"].items():
        if not isinstance(outcome, dict):
            return f"the outcome of {case!r} is no object"
        for name, kinds in _OUTCOME.items():
            if not isinstance(outcome.get(name, _DEFAULTS.get(name, _Missing)), kinds):
                return f"the outcome of {case!r} has no {name} that it could have"
        if unknown := outcome.keys() - _OUTCOME.keys():
            return f"the outcome of {case!r} has {min(unknown)!r}, which is none of its figures"
        figures = [*outcome.get("more", {}).values(), *(v for v in outcome.values() if isinstance(v, int))]
        if not all(
            (isinstance(figure, (int, float)) and abs(figure) < _MOST) or figure != figure
            for figure in figures
        ):
            return f"the outcome of {case!r} has a figure that is none"
    return ""


class _Missing:
    """Stands for a field that is not there and may not be missing."""


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types that JSON has for a field: a whole number is a float too."""
    found = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in found)
    return (*plain, int) if float in plain else plain


_OUTCOME = {name: _kinds(hint) for name, hint in typing.get_type_hints(Outcome).items()}
_DEFAULTS = {f.name: f.default for f in fields(Outcome) if f.default is not MISSING} | {"more": {}}
