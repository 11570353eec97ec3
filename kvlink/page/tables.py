"""The page of an evaluation: its plots and every row.

Does not know: how anything was measured. Place on the path: the face of `kvlink eval`.
"""

from __future__ import annotations

from typing import Any

from kvlink.page import plots
from kvlink.page.frame import fill
from kvlink.quoting import shown

_LEFT_OUT = {"table", "model", "data", "seed", "recipe_full", "mode"}


def render(report: dict[str, Any]) -> str:
    """HTML of a report as `kvlink eval --json` prints it."""
    report = _lines(report)
    sections = []
    for run in report["runs"]:
        rows = [r for r in report["rows"] if _of(r, run)]
        drawn = (
            ("Quality against bytes", plots.quality(rows)),
            ("Divergence against bytes", plots.distortion(rows)),
            ("Which positions to keep, and what is asked of them", plots.retention(rows)),
            ("When the cache beats the text", plots.rates(rows)),
            ("Where the energy is", plots.spectrum(rows)),
        )
        sections.append(
            {
                "run": run,
                "plots": [(title, svg) for title, svg in drawn if svg],
                "tables": [_table(name, rows) for name in dict.fromkeys(row["table"] for row in rows)],
            }
        )
    return fill(
        "tables.html", title=f"kvlink eval {report['table']}", sections=sections, notes=report["notes"]
    )


def _lines(value: Any) -> Any:
    """A report with its texts as lines that can be drawn: a plot takes what is given to it as it is."""
    if isinstance(value, dict):
        return {name: _lines(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lines(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def _of(row: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether a row belongs to a run; rows without a variant belong to the plain one."""
    variant = run.get("variant", "plain")
    return (row["model"], row["data"], row.get("variant", "plain")) == (run["model"], run["data"], variant)


def _table(name: str, rows: plots.Rows) -> dict[str, Any]:
    """Columns that any row of the table has, and the cells as text."""
    chosen = [row for row in rows if row["table"] == name]
    columns = [
        column
        for column in dict.fromkeys(key for row in chosen for key in row)
        if column not in _LEFT_OUT and any(row.get(column) not in (None, "") for row in chosen)
    ]
    if "recipe" not in columns:
        columns.insert(0, "recipe")
    cells = [[_cell(row.get(column)) for column in columns] for row in chosen]
    return {"name": name, "columns": [column.replace("_", " ") for column in columns], "rows": cells}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
