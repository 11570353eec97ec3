"""The table of docs/models.md: python -m tests.sweep [--write] [FAMILY …]. Minutes; downloads nothing."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from kvlink.model.loading import embedded_folder
from tests.sweep.families import make, names
from tests.sweep.verdicts import RECIPES, Row, judge

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
START, END = "<!-- sweep -->", "<!-- /sweep -->"


def sweep(families: list[str]) -> tuple[list[Row], list[str]]:
    """The rows of families that can be made small, and the names of the others."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder())
    rows, large = [], []
    for family in families:
        model = make(family)
        if model is None:
            large.append(family)
            continue
        rows.append(judge(family, model, tokenizer))
        told = {name: verdict.kind for name, verdict in rows[-1].by_recipe.items()} or rows[-1].load.words
        print(f"{family:28} {told}", file=sys.stderr, flush=True)
    return rows, large


def table(rows: list[Row], large: list[str]) -> str:
    """The page's part as markdown."""
    served = [row for row in rows if row.by_recipe]
    through = [row for row in served if all(v.kind == "exact" for v in row.by_recipe.values())]
    count = Counter(kind for row in rows for kind in row.kinds)
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} families and variants; {len(through)} exact through all "
        f"of {', '.join(RECIPES)}; {len(served) - len(through)} with a recipe refused; {len(rows) - len(served)} refused "
        f"at load; {count['wrong']} wrong, {count['traceback']} tracebacks.",
        "",
        f"| family | keys and values | {' | '.join(RECIPES)} |",
        "|---|---|" + "---|" * len(RECIPES),
    ]
    for row in served:
        cells = [v.words if v.kind == "exact" else f"{v.kind}: {v.words}" for v in row.by_recipe.values()]
        lines.append(f"| {row.family} | {row.traits} | {' | '.join(cells)} |")
    lines += ["", "| refused at load | words |", "|---|---|"]
    lines += [f"| {row.family} | {row.load.words.replace('|', ' ')} |" for row in rows if not row.by_recipe]
    lines += ["", f"Not made small enough, or not without other packages: {', '.join(large)}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KVLINK_CACHE_DIR"] = folder
        rows, large = sweep(asked.families or names())
    made = table(rows, large)
    if asked.write:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        PAGE.write_text(f"{head}{START}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(made)
    return int(any({"wrong", "traceback"} & row.kinds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
