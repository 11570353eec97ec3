"""The embedded model answers from its context, and what is dropped shows.

The figures in the README come from more questions; these are floors for a quick run.
"""

from __future__ import annotations

import itertools
import statistics

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.eval.questions import generated
from kvlink.eval.score import f1

COUNT = 40


@pytest.fixture(scope="module")
def scores(tiny):
    """F1 by recipe over the same questions, the receiver's answers."""
    sender, receiver = Sender(tiny), Receiver(tiny)
    recipes = (
        "raw",
        "int8",
        "q2c@0.25 raw",
        "q2c+draft@0.25 raw",
        "h2o@0.25 raw",
        "streaming@0.25 raw",
        "random@0.25 raw",
    )
    found: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for item in itertools.islice(generated(991), COUNT):
        context = sender.read(item.context)
        for recipe in recipes:
            held = receiver.receive(sender.pack(context, item.question, recipe).frames)
            found[recipe].append(f1(receiver.answer(held, item.question).text, item.answers))
    return {recipe: statistics.fmean(values) for recipe, values in found.items()}


def test_it_answers_from_its_context(scores):
    assert scores["raw"] >= 0.8


def test_int8_loses_nothing(scores):
    assert scores["int8"] >= scores["raw"] - 0.02


def test_the_draft_keeps_what_is_needed(scores):
    assert scores["q2c+draft@0.25 raw"] >= scores["raw"] - 0.08


def test_what_the_question_attends_to_beats_what_it_does_not(scores):
    others = max(scores[f"{method}@0.25 raw"] for method in ("h2o", "streaming", "random"))
    assert scores["q2c@0.25 raw"] > others + 0.1


def test_paraphrases_are_understood(tiny):
    sender = Sender(tiny)
    right = []
    for item in itertools.islice(generated(992), COUNT):
        context = sender.read(item.context)
        right.append(f1(sender.answer(context, item.paraphrases[0]).text, item.answers))
    assert statistics.fmean(right) >= 0.75


def test_contexts_of_a_thousand_tokens_are_read(tiny):
    sender = Sender(tiny)
    right, lengths = [], []
    for item in itertools.islice(generated(993, (48, 60)), 20):
        context = sender.read(item.context)
        lengths.append(context.cache.tokens)
        right.append(f1(sender.answer(context, item.question).text, item.answers))
    assert max(lengths) > 900
    assert statistics.fmean(right) >= 0.6
