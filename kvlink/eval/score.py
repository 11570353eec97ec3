"""Scores of an answer against gold answers, as SQuAD defines them.

Lower case, punctuation and the articles a, an, the removed, white space folded; F1 over the
multiset of words; the maximum over the gold answers. A question without an answer is right when
the prediction says so.

Source: Rajpurkar et al., arXiv 1606.05250 §4 and arXiv 1806.03822.
Does not know: models, transfers. Place on the path: after it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The text as the official scorer compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 where the normalised prediction equals a gold answer, else 0.0."""
    return float(any(normalise(prediction) == normalise(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The best multiset F1 over the gold answers, in [0, 1]. `golds` must not be empty."""
    return max(_f1(normalise(prediction).split(), normalise(gold).split()) for gold in golds)


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` (percentiles of resampled means)."""
    rng = np.random.default_rng(seed)
    data = np.asarray(values, np.float64)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))
