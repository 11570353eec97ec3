"""Making a profile: statistics from some texts, and on others what each step keeps.

Does not know: how statistics are gathered or coded. Place on the path: before it; what
`kvlink profile build` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvlink.codecs import step_of
from kvlink.eval.items import Item
from kvlink.eval.measure import Bench
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

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums and eigenvectors hang, in their last bits, on how many add them up
    try:
        return _make(lm, build_profile(lm, texts, on_step), held_out, on_step)
    finally:
        torch.set_num_threads(threads)


def _make(
    lm: LanguageModel, profile: Profile, held_out: Sequence[Item], on_step: Callable[[], object]
) -> Profile:
    """The profile with what each step keeps on the questions that it has not seen."""
    bench = Bench(replace(lm, profile=profile))
    recipes = {code: f"transform={step_of(code)}" for code in CODES}
    kept: dict[str, list[bool]] = {recipe: [] for recipe in recipes.values()}
    cases = [Case(recipe, shift) for recipe in kept for shift in ("same", "paraphrase")]
    for item in held_out:
        outcomes = bench.measure(item, cases)["outcomes"]
        for case in cases:
            if case.key in outcomes:  # not every question has a paraphrase
                kept[case.recipe].append(outcomes[case.key]["agrees"])
        on_step()
    shares = ((code, kept[recipe]) for code, recipe in recipes.items())
    return replace(profile, quality=tuple((code, sum(found) / len(found)) for code, found in shares if found))
