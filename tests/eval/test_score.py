"""Scores as SQuAD's official scorer gives them, worked out by hand."""

from __future__ import annotations

import pytest

from kvlink.eval.score import exact_match, f1, normalise


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
    ],
)
def test_scores(prediction, golds, em, score):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(score)


def test_normalisation_folds_case_articles_punctuation_and_space():
    assert normalise("  The  Cat, an OWL; a dog. ") == "cat owl dog"
