"""Generation: greedy equals the model's own `generate`; stops, samples, limits."""

from __future__ import annotations

import pytest
import torch

from kvlink.errors import ContextError
from kvlink.model.generate import answer, generate
from kvlink.model.prefill import prefill
from tests.conftest import ARCHITECTURES

TEXT = "Mira Dosh was born in Tavik. Ren Holt was born in Lisket. " * 3
QUESTION = "Where was Ren Holt born?"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_greedy_tokens_equal_the_models_own_generate(random_lm, architecture):
    lm = random_lm(architecture)
    ids = lm.context_ids(TEXT)
    asked = lm.question_ids(QUESTION, len(ids))
    ours = answer(lm, prefill(lm, ids), QUESTION, max_new_tokens=10).token_ids
    whole = torch.tensor([ids + asked])
    theirs = lm.model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=10, do_sample=False
    )
    theirs = theirs[0, whole.shape[1] :].tolist()
    assert list(ours) == theirs[: len(ours)]
    assert len(ours) == len(theirs) or "\n" in lm.tokenizer.decode(ours)


def test_steps_join_to_the_answer(random_lm):
    lm = random_lm("qwen2")
    cache = prefill(lm, lm.context_ids(TEXT))
    steps = list(generate(lm, cache, QUESTION, max_new_tokens=12))
    assert [step.elapsed_s for step in steps] == sorted(step.elapsed_s for step in steps)
    assert "".join(step.text for step in steps).strip() == answer(lm, cache, QUESTION, max_new_tokens=12).text


def test_sampling_follows_its_seed(random_lm):
    lm = random_lm("qwen2")
    cache = prefill(lm, lm.context_ids(TEXT))
    one = answer(lm, cache, QUESTION, temperature=1.5, seed=1, max_new_tokens=12)
    assert one.token_ids == answer(lm, cache, QUESTION, temperature=1.5, seed=1, max_new_tokens=12).token_ids
    assert one.token_ids != answer(lm, cache, QUESTION, temperature=1.5, seed=2, max_new_tokens=12).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 100_000}, "more than the model's window"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_options_are_checked(tiny, options, message):
    cache = prefill(tiny, tiny.context_ids(TEXT))
    with pytest.raises(ContextError, match=message):
        answer(tiny, cache, QUESTION, **options)


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_an_empty_question_is_refused(tiny, question):
    with pytest.raises(ContextError, match="question is empty"):
        tiny.question_ids(question, 10)


def test_text_that_is_no_text_is_refused(tiny):
    with pytest.raises(ContextError, match="empty"):
        tiny.context_ids(" ")
    with pytest.raises(ContextError, match="window"):
        tiny.context_ids("word " * 5000)
    with pytest.raises(ContextError, match="is not whole"):
        tiny.context_ids("lone \ud800 surrogate")
