"""Making a profile: statistics from some texts, and on others what each step keeps.

Does not know: how statistics are gathered or coded. Place on the path: before it; what
`kvlink profile build` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvlink.compress.transform import rotated
from kvlink.eval.measure import Bench
from kvlink.eval.questions import Item
from kvlink.eval.tables import Case
from kvlink.model.calibrate import build_profile
from kvlink.model.loading import LanguageModel
from kvlink.profile import Profile

CODES = range(-8, 9)
"""Steps whose quality is measured: 1/4 to 4, a quarter of an octave apart."""


def make_profile(
    lm: LanguageModel, texts: Sequence[str], held_out: Sequence[Item], on_step: Callable[[], object]
) -> Profile:
    """A profile from `texts`, with the share of answers that each step keeps on `held_out`.

    Deterministic: the same texts, questions and model give the same bytes. An answer is kept where it
    is, letter for letter, the sender's own; paraphrases count beside the questions.
    """

    def unrotate(keys: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return rotated(keys, positions, rotation, -1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums and eigenvectors hang, in their last bits, on how many add them up
    try:
        return _make(lm, build_profile(lm, texts, unrotate, on_step), held_out, on_step)
    finally:
        torch.set_num_threads(threads)


def _make(
    lm: LanguageModel, profile: Profile, held_out: Sequence[Item], on_step: Callable[[], object]
) -> Profile:
    """The profile with what each step keeps on the questions that it has not seen."""
    bench = Bench(replace(lm, profile=profile))
    cases = [
        Case(f"transform={2 ** (code / 4)}", shift) for code in CODES for shift in ("same", "paraphrase")
    ]  # fmt: skip
    kept: dict[str, list[bool]] = {}
    for item in held_out:
        for key, outcome in bench.measure(item, cases)["outcomes"].items():
            kept.setdefault(key.split(" | ")[1], []).append(outcome["agrees"])
        on_step()
    shares = [(code, kept.get(f"transform={2 ** (code / 4)}", [])) for code in CODES]
    return replace(profile, quality=tuple((code, sum(found) / len(found)) for code, found in shares if found))
