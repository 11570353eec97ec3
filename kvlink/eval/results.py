"""Rows from records: the tables of a run, and their files.

Does not know: models, processes. Place on the path: after a run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvlink.errors import ContextError
from kvlink.eval.record import Record
from kvlink.eval.rows import Row, summarise
from kvlink.eval.tables import Case


def rows_of(record: Record, tables: Mapping[str, Sequence[Case]]) -> list[Row]:
    """The rows of all tables, in order. Cases that no item had a question for have no row."""
    sums: dict[str, Row | None] = {}
    rows: list[Row] = []
    for table, cases in tables.items():
        for case in cases:
            if case.key not in sums:
                sums[case.key] = _sum_up(record, case)
            row = sums[case.key]
            if row is not None:
                row = replace(row, table=table)
                rows += _by_layer(row) if case.kind == "spectrum" else [row]
    return rows


def _sum_up(record: Record, case: Case) -> Row | None:
    found = record.outcomes(case.key)
    if not found:
        return None
    header = record.header
    known = {"model": header["model"], "data": header["data"], "seed": header["seed"]}
    row = summarise(case.recipe, found, shift=case.shift, **known)
    if case.kind != "spectrum":
        row = replace(row, more={**row.more, "variant": header.get("variant", "plain")})
    if case.kind in ("whole", "added"):
        return replace(row, mode=case.kind)
    if case.cut < 1:
        row = replace(row, more={**row.more, "cut": case.cut, "order": case.order})
    if case.kind == "answer":
        return row
    # Nothing travels: there are no bytes and no time to speak of.
    row = replace(row, mode=case.kind, wire_bytes=None, bits_per_element=None, ttft_s=None)
    return replace(row, mode="masked+zeroed") if case.zeroed else row


def _by_layer(row: Row) -> list[Row]:
    """The spectrum's figures by layer and side, a row each: share of energy in the top 5 %."""
    out = []
    for name, share in row.more.items():
        side, _, layer = name.partition("/")
        if not layer.isascii() or not layer.isdecimal():
            raise ContextError(f"the spectrum's figures are called SIDE/LAYER, found {name!r}")
        out.append(
            Row(
                table=row.table, model=row.model, data=row.data, mode="spectrum", recipe=row.recipe,
                recipe_full=row.recipe_full, n=row.n, context_tokens=row.context_tokens, seed=row.seed,
                more={"layer": int(layer), "side": side, "energy_top5": share},
            )
        )  # fmt: skip
    return out


def to_json(rows: Sequence[Row], **told: Any) -> dict[str, Any]:
    """What `--json` prints: an object with `rows`, and what the run says of itself."""
    return {**told, "rows": [row.to_dict() for row in rows]}


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: all columns that any row has; what a row lacks stays empty."""
    flat = [row.to_dict() for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def to_jsonl(rows: Sequence[Row]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
