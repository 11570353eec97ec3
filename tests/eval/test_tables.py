"""The plan of the tables, and rows that sum up what was found."""

from __future__ import annotations

import csv
import io
import itertools
import json

import pytest

from kvlink.errors import ConfigError, RecipeError
from kvlink.eval.results import rows_of, to_csv, to_json, to_jsonl
from kvlink.eval.rows import Outcome, summarise
from kvlink.eval.run import Record
from kvlink.eval.tables import QUESTION_TABLES, Case, plan

DEMO = "mode recipe recipe_full n f1 f1_low f1_high f1_full agreement wire_bytes bits_per_element ttft_s context_tokens"
EVAL = "selection scope retention method question_shift em kl_mean ci_low ci_high context_tokens seed"


def outcome(score: float = 1.0, full: float = 1.0, **more) -> Outcome:
    values = {
        "answer": "a", "own_answer": "a", "f1": score, "f1_full": full, "em": score, "agrees": score == full,
        "wire_bytes": 1000, "bits_per_element": 4.0, "ttft_s": 0.01, "context_tokens": 100, "kept_tokens": 50,
        "kl": 0.1, "kl_most": 0.3,
    }  # fmt: skip
    return Outcome(**{**values, **more})


def test_the_selection_table_has_the_whole_grid():
    cases = {(c.recipe, c.shift) for c in plan("selection")["selection"]}
    methods = ("q2c", "q2c+draft", "snapkv", "snapkv+question", "h2o", "streaming", "random")
    shifts = ("same", "paraphrase", "entity", "unrelated")
    for method, amount, shift in itertools.product(methods, (0.75, 0.5, 0.25, 0.1), shifts):
        assert (f"{method}@{amount} raw", shift) in cases
        assert (f"{method}@{amount} raw scope=head", shift) in cases
    for method, amount in itertools.product(methods, (0.75, 0.5, 0.25)):
        assert (f"{method}@{amount} raw when=during", "same") in cases


def test_the_other_tables_have_theirs():
    assert {c.recipe for c in plan("quantization")["quantization"]} >= {
        "raw", "int8", "int4", "int3", "int2", "int1", "text",
    }  # fmt: skip
    combined = {c.recipe for c in plan("combined")["combined"]}
    for method, amount, codec in itertools.product(
        ("q2c", "snapkv"), (0.25, 0.5, 0.75, 1.0), ("raw", "int8", "int4")
    ):
        assert f"{method}@{amount} {codec}" in combined
    assert {f"svd={rank} raw" for rank in (8, 16, 32, 64)} <= {c.recipe for c in plan("low-rank")["low-rank"]}
    assert set(plan("all")) == set(QUESTION_TABLES)


def test_only_one_method_can_be_asked_for():
    for when in ("after", "during"):
        found = plan("methods", when=when)["methods"]
        assert {("during" in case.recipe) for case in found} == {when == "during"}


def test_presses_and_recipes_join():
    assert "press:KnormPress@0.5 raw" in {
        c.recipe for c in plan("selection", ["press:KnormPress"])["selection"]
    }
    assert plan("recipes", recipes=["int4"])["recipes"] == [Case("int4"), Case("int4", "paraphrase")]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"table": "selections"}, ConfigError, "unknown table 'selections'; known: selection, quantization"),
        ({"table": "recipes"}, ConfigError, "needs at least one --recipe"),
        ({"table": "recipes", "recipes": ["int5"]}, RecipeError, "got 'int5'"),
        ({"table": "selection", "presses": ["press:a b"]}, RecipeError, "press:a needs an amount"),
        ({"table": "selection", "when": "before"}, ConfigError, "when must be after or during"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        plan(**arguments)


def test_a_row_has_every_field_by_its_name():
    row = summarise("q2c@0.5 int4", [outcome()], table="selection", seed=3).to_dict()
    assert set(f"{DEMO} {EVAL}".split()) <= set(row)
    assert (row["selection"], row["scope"], row["retention"], row["method"]) == (
        "q2c",
        "shared",
        0.5,
        "after",
    )
    assert row["sees"] == "context and question"
    assert "more" not in row, "figures of one table stand beside the others"
    assert row["seed"] == 3


def test_the_paired_interval_is_of_the_difference_to_full():
    # Hard questions are hard for both: the paired interval is narrow where F1's own is wide.
    found = [outcome(score, full) for score, full in [(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 30 + [(0.9, 1.0)] * 4]
    row = summarise("int4", found)
    assert row.f1_high - row.f1_low > 0.2
    assert -0.02 < row.ci_low <= row.f1 - row.f1_full <= row.ci_high <= 0
    assert row.share_of_full == pytest.approx(row.f1 / row.f1_full)
    assert row.agreement == pytest.approx(60 / 64)
    assert row.kl_mean == pytest.approx(0.1)
    assert row.kl_most == pytest.approx(0.3)


HEADER = {"model": "m", "data": "d", "seed": 1, "items": 2, "cases": []}


def record(*cases: Case) -> Record:
    from dataclasses import asdict

    more = {"keys/0": 0.5, "values/0": 0.7, "keys/1": 0.4, "values/1": 0.6}
    lines = {
        i: {
            "item": i, "context_tokens": 10 + i,
            "outcomes": {c.key: asdict(outcome(more=more if c.kind == "spectrum" else {})) for c in cases},
        }
        for i in (1, 0)
    }  # fmt: skip
    lines[2] = {"item": 2, "skipped": "too long"}
    return Record(HEADER, lines)


def test_rows_come_in_the_order_of_the_plan_and_skip_what_nobody_asked():
    shown = [Case("int8"), Case("int4", "paraphrase"), Case("raw")]
    rows = rows_of(record(Case("raw"), Case("int8")), {"quantization": shown})
    assert [row.recipe for row in rows] == ["int8", "raw"]
    assert {row.n for row in rows} == {2}


def test_what_does_not_travel_has_no_bytes():
    masked, zeroed = Case("q2c@0.5 raw", kind="masked"), Case("q2c@0.5 raw", kind="masked", zeroed=True)
    rows = rows_of(record(masked, zeroed), {"masking": [masked, zeroed]})
    assert [row.mode for row in rows] == ["masked", "masked+zeroed"]
    assert {row.wire_bytes for row in rows} == {None}


def test_the_spectrum_has_a_row_a_layer_and_side():
    rows = rows_of(record(Case("raw", kind="spectrum")), {"spectrum": [Case("raw", kind="spectrum")]})
    found = [(row.more["layer"], row.more["side"], row.more["energy_top5"]) for row in rows]
    assert found == [(0, "keys", 0.5), (0, "values", 0.7), (1, "keys", 0.4), (1, "values", 0.6)]
    assert {row.f1 for row in rows} == {None}


def test_rows_are_the_same_in_every_form():
    rows = rows_of(record(Case("raw"), Case("int8")), {"quantization": [Case("raw"), Case("int8")]})
    told = to_json(rows, table="quantization")["rows"]
    assert [json.loads(line) for line in to_jsonl(rows).splitlines()] == told
    for row, line in zip(told, csv.DictReader(io.StringIO(to_csv(rows))), strict=True):
        assert line["recipe"] == row["recipe"]
        assert float(line["f1"]) == row["f1"]
        assert line["retention"] == ("" if row["retention"] is None else str(row["retention"]))
