"""Print the tables of docs/identity.md.

    python -m tests.identity [MODEL …]

MODEL: as for `--model`, whose noise and signal are measured; the embedded one where none is given.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import transformers

from kvlink.model.loading import EMBEDDED, LanguageModel, load
from kvlink.model.sources import folder_of
from kvlink.sketch import TOLERANCE
from tests.identity.changes import CHANGES, HARMLESS, Change, Known, caches_apart, pair
from tests.identity.same import apart, clothes, elsewhere, in_own_dtype, noise, tuned


def main(models: Sequence[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for title, table in (("Fields that alter a cache", CHANGES), ("Fields that do not", HARMLESS)):
        print(f"\n{title}\n")
        print(
            "| family | field | from → to | caches apart | fingerprint | probe |\n|---|---|---|---|---|---|"
        )
        for change in table:
            print(row(change), flush=True)
    for name in models or [EMBEDDED]:
        lm = load(name)
        print(f"\n{lm.name.split('/')[-1]}, {lm.dtype}\n")
        print("| the same model | caches of the fixed text apart | fingerprint | probe |\n|---|---|---|---|")
        folder = str(folder_of(name) or name)
        with tempfile.TemporaryDirectory() as scratch:
            for what, other in clothes(folder, Path(scratch)):
                told = f"{noise(lm, other):.1g} | {different(lm, other)} | {verdict(apart(lm.sketch, other.sketch))}"
                print(f"| {what} | {told} |", flush=True)
        print(
            f"| a processor without AVX | | same | {verdict(apart(lm.sketch, elsewhere(folder)))} |",
            flush=True,
        )
        print("\n| another model | probe |\n|---|---|")
        for what, sketch in tuned(lm):
            print(f"| {what} | {verdict(apart(lm.sketch, sketch))} |", flush=True)
        print("\n| if it were read in its own dtype | probe |\n|---|---|")
        for what, share in short(lm):
            print(f"| {what} | {share:.2g} |", flush=True)


def row(change: Change) -> str:
    one, two = pair(change)
    off = caches_apart(one, two)
    told = "other shapes" if off == float("inf") else f"{off:.1%}"
    _, _, values = str(change).partition(f"{change.field} ")
    return (
        f"| {change.family} | `{change.field}` | {values} | {told} | {different(one, two)} "
        f"| {verdict(apart(one.sketch, two.sketch))} |"
    )


def different(one: LanguageModel | Known, two: LanguageModel | Known) -> str:
    """The components that differ."""
    names = [f.name for f in fields(one.fingerprint)]
    return ", ".join(n for n in names if getattr(one.fingerprint, n) != getattr(two.fingerprint, n)) or "same"


def verdict(share: float) -> str:
    return f"{share:.2g}, {'refused' if share > TOLERANCE else 'same'}"


def short(lm: LanguageModel) -> Iterator[tuple[str, float]]:
    for dtype in (torch.float16, torch.bfloat16):
        made = [in_own_dtype(lm, dtype, attention) for attention in ("sdpa", "eager")]
        name = str(dtype).removeprefix("torch.")
        yield f"{name}, two kernels of attention", apart(*made)
        yield f"{name} against float32", apart(lm.sketch, made[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        models = [str(folder_of(name) or name) for name in sys.argv[1:]]
        os.environ["KVLINK_CACHE_DIR"] = cache
        main(models)
