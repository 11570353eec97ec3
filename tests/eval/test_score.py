"""Scores as the official scorers give them, worked out by hand; intervals that mean something."""

from __future__ import annotations

import numpy as np
import pytest

from kvlink.eval.score import exact_match, f1, interval, normalise


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "score"),
    [
        ("France", ["France"], 1.0, 1.0),
        ("the France.", ["France"], 1.0, 1.0),
        ("in France", ["France"], 0.0, 2 / 3),
        ("Denmark", ["Iceland", "Denmark", "Norway"], 1.0, 1.0),
        ("10th and 11th centuries", ["in the 10th and 11th centuries", "10th century"], 0.0, 2 * 4 / 9),
        ("", ["France"], 0.0, 0.0),
        ("", [""], 1.0, 1.0),
        ("a b b", ["b b b"], 0.0, 2 * 2 / 5),
        ("rivers", ["river"], 0.0, 0.0),
        ("don't", ["dont"], 1.0, 1.0),
        ("well-kept", ["wellkept"], 1.0, 1.0),
    ],
)
def test_squad_scores(prediction, golds, em, score):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "score"),
    [
        ("Sunset Boulevard", ["sunset boulevard"], 1.0, 1.0),
        ("Sunset_Boulevard", ["Sunset Boulevard"], 1.0, 1.0),
        ("well-kept", ["well kept"], 1.0, 1.0),
        ("well-kept", ["wellkept"], 0.0, 0.0),
        ("‘Sunset’ Blvd.", ["Sunset Blvd"], 1.0, 1.0),
        ("the Sunset", ["Sunset", "Sunset Boulevard"], 1.0, 1.0),
        ("on Sunset Boulevard", ["Sunset Boulevard"], 0.0, 0.8),
        ("", [""], 1.0, 0.0),
    ],
)
def test_trivia_scores(prediction, golds, em, score):
    assert exact_match(prediction, golds, "trivia") == em
    assert f1(prediction, golds, "trivia") == pytest.approx(score)


def test_normalisation_folds_case_articles_punctuation_and_space():
    assert normalise("  The  Cat, an OWL; a dog. ") == "cat owl dog"
    assert normalise("A man, a plan_of-action", "trivia") == "man plan of action"


def test_an_interval_holds_the_mean_and_narrows_with_n():
    rng = np.random.default_rng(0)
    few, many = (rng.random(n) < 0.7 for n in (50, 5000))
    for values in (few, many):
        low, high = interval(values)
        assert low < np.mean(values) < high
    assert np.subtract(*interval(many)[::-1]) < np.subtract(*interval(few)[::-1]) / 5
    half = 1.96 * np.sqrt(0.7 * 0.3 / 5000)
    assert interval(many)[1] - np.mean(many) == pytest.approx(half, rel=0.15), "the normal theory's width"


def test_the_paired_interval_of_equal_scores_is_a_point():
    assert interval([0.0] * 20) == (0.0, 0.0)


def test_intervals_are_the_same_in_every_process():
    assert interval([0.0, 1.0, 1.0, 0.5]) == interval([0.0, 1.0, 1.0, 0.5])
