"""Scores of an answer against gold answers, as the data sets define them, and their intervals.

SQuAD: lower case, punctuation and the articles a, an, the removed, white space folded; F1 over the
multiset of words; the maximum over the gold answers. A question without an answer is right when
the prediction says so. TriviaQA: the same, but punctuation (typographic quotes and the underscore
too) becomes a space, and an empty answer is never right.

Source: Rajpurkar et al., arXiv 1606.05250 §4 and arXiv 1806.03822; Joshi et al., arXiv 1705.03551.
Does not know: models, transfers. Place on the path: after it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kvlink.eval.items import Rules

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_REMOVED = str.maketrans("", "", string.punctuation)
_SPACED = {ord(mark): " " for mark in string.punctuation + "‘’´`"}
DRAWS = 2000


def normalise(text: str, rules: Rules = "squad") -> str:
    """The text as the official scorer compares it."""
    table = _REMOVED if rules == "squad" else _SPACED
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(table)).split())


def exact_match(prediction: str, golds: Sequence[str], rules: Rules = "squad") -> float:
    """1.0 where the normalised prediction equals a gold answer, else 0.0."""
    return float(any(normalise(prediction, rules) == normalise(gold, rules) for gold in golds))


def f1(prediction: str, golds: Sequence[str], rules: Rules = "squad") -> float:
    """The best multiset F1 over the gold answers, in [0, 1]. `golds` must not be empty."""
    found = normalise(prediction, rules).split()
    return max(_f1(found, normalise(gold, rules).split(), rules) for gold in golds)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` (percentiles of 2,000 resampled means).

    Of differences to the full cache's scores, question by question, it is the paired interval.
    """
    data = np.asarray(values, np.float64)
    means = data[_draws(len(data), seed)].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(count: int, seed: int) -> np.ndarray:
    """Indices of the resampled questions, `[DRAWS, count]`: the same for all rows of a table."""
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def _f1(found: list[str], gold: list[str], rules: Rules) -> float:
    if not found or not gold:
        return float(found == gold) if rules == "squad" else 0.0
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))
