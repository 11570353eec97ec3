"""Selection: what each method keeps, on evidence made by hand, and rules that hold for all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlink.cache import Evidence
from kvlink.compress.select import choose_positions, kept_count, mass_count, needs, sees
from kvlink.compress.selections import scorer
from kvlink.errors import RecipeError
from kvlink.payload import CacheShape
from kvlink.selection import METHODS, NAMED, Amount, Selection

TOKENS = 40
SHAPE = CacheShape(2, 2, TOKENS, 8, "bfloat16")


def peaks(*places: int, base: float = 0.001) -> torch.Tensor:
    """Attention `[L, Hkv, T]` with peaks at `places`, the same for all heads."""
    scores = torch.full((2, 2, TOKENS), base)
    scores[..., list(places)] = 1.0
    return scores


def evidence() -> Evidence:
    return Evidence(
        question=peaks(10),
        draft=peaks(20),
        window=peaks(12),
        asked_window=peaks(16),
        mass=peaks(14),
        press=peaks(18),
        question_tokens=5,
        draft_tokens=5,
        window_tokens=6,
        asked_window_tokens=6,
    )


def keep(method: str, count: int, **options) -> list[int]:
    options = {"sinks": 2, "recent": 2, "pool": 1, **options}
    chosen = choose_positions(evidence(), Selection(method, Amount(count, "count"), **options), SHAPE)
    return chosen.tolist()


def test_q2c_keeps_what_the_question_attends_to():
    assert keep("q2c", 5) == [0, 1, 10, 38, 39]


def test_the_draft_votes_beside_the_question():
    assert keep("q2c+draft", 6) == [0, 1, 10, 20, 38, 39]


def test_pooling_keeps_the_neighbours_of_a_peak():
    assert keep("q2c", 9, pool=5) == [0, 1, 8, 9, 10, 11, 12, 38, 39]


def test_snapkv_keeps_its_window_but_at_most_half_of_what_is_kept():
    kept = keep("snapkv", 12)
    assert set(range(34, 40)) <= set(kept)
    assert 12 in kept
    assert keep("snapkv", 6)[-3:] == [37, 38, 39]


def test_h2o_keeps_half_heavy_hitters_half_recent():
    kept = keep("h2o", 10)
    assert set(range(35, 40)) <= set(kept)
    assert 14 in kept


def test_streaming_keeps_sinks_and_recent():
    assert keep("streaming", 6) == [0, 1, 36, 37, 38, 39]


def test_random_is_the_same_for_a_seed_and_another_for_another():
    assert keep("random", 12, seed=1) == keep("random", 12, seed=1) != keep("random", 12, seed=2)


def test_head_scope_lets_every_head_choose_its_own():
    question = torch.full((2, 2, TOKENS), 0.001)
    for layer in range(2):
        for head in range(2):
            question[layer, head, 10 + 4 * layer + head] = 1.0
    selection = Selection("q2c", Amount(5, "count"), scope="head", sinks=2, recent=2, pool=1)
    chosen = choose_positions(Evidence(question=question, question_tokens=1), selection, SHAPE)
    assert chosen.shape == (2, 2, 5)
    assert [[chosen[x, h, 2].item() for h in range(2)] for x in range(2)] == [[10, 11], [14, 15]]


def test_every_head_votes_with_the_same_mass():
    """A head whose attention is all on the sinks must not be silent, nor a peaky one dominate."""
    question = torch.full((2, 2, TOKENS), 1e-6)
    question[0, 0, 10] = 0.9
    question[0, 1, 0] = 0.999999
    question[0, 1, 20] = 1e-4
    selection = Selection("q2c", Amount(6, "count"), sinks=2, recent=2, pool=1)
    chosen = choose_positions(Evidence(question=question, question_tokens=1), selection, SHAPE)
    assert {10, 20} <= set(chosen.tolist())


def test_ties_go_to_the_lower_position():
    flat = Evidence(question=torch.ones(2, 2, TOKENS), question_tokens=1)
    selection = Selection("q2c", Amount(10, "count"), sinks=2, recent=2, pool=1)
    assert choose_positions(flat, selection, SHAPE).tolist() == [*range(8), 38, 39]


def test_mass_keeps_the_fewest_positions_that_hold_the_share():
    scores = torch.zeros(1, 10)
    scores[0, :4] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    nothing = torch.zeros(10, dtype=torch.bool)
    assert mass_count(scores, 0.5, nothing) == 1
    assert mass_count(scores, 0.51, nothing) == 2
    assert mass_count(scores, 0.95, nothing) == 3
    assert mass_count(scores, 1.0, nothing) == 4


def test_mass_with_head_scope_keeps_as_many_as_the_neediest_head():
    scores = torch.zeros(2, 10)
    scores[0, 0] = 1.0
    scores[1, :5] = 0.2
    assert mass_count(scores, 0.99, torch.zeros(10, dtype=torch.bool)) == 5


@given(
    st.sampled_from([m for m in NAMED if m != "all"]),
    st.floats(0.001, 1.0),
    st.sampled_from(["shared", "head"]),
)
def test_rules_that_hold_for_every_method(method, ratio, scope):
    selection = Selection(method, Amount(ratio), scope=scope)
    chosen = choose_positions(evidence(), selection, SHAPE)
    count = kept_count(selection, TOKENS)
    assert chosen.shape[-1] == count
    for row in chosen.reshape(-1, count).tolist():
        assert row == sorted(set(row)), "ascending, each once"
        assert set(range(4)) <= set(row), "sinks"
        assert set(range(32, 40)) <= set(row), "recent"
        assert all(0 <= place < TOKENS for place in row)


@given(st.integers(1, 500), st.floats(0.001, 1.0))
def test_kept_count_rounds_up_and_stays_in_range(tokens, ratio):
    count = kept_count(Selection("q2c", Amount(ratio)), tokens)
    assert min(tokens, 12) <= count <= tokens
    assert count >= ratio * tokens - 1e-6


def test_a_method_sees_what_it_needs_and_nothing_else():
    for method in METHODS:
        if not needs(method):
            continue
        everything = evidence()
        only = Evidence(
            **{name: getattr(everything, name) for name in needs(method)},
            question_tokens=5, draft_tokens=5, window_tokens=6, asked_window_tokens=6,
        )  # fmt: skip
        selection = Selection(method, Amount(0.5), press="KnormPress" if method == "press" else "")
        assert torch.equal(
            choose_positions(only, selection, SHAPE), choose_positions(everything, selection, SHAPE)
        )
        with pytest.raises(RecipeError, match="was not captured"):
            choose_positions(Evidence(), selection, SHAPE)


def test_every_method_is_scored_and_says_what_it_sees():
    assert all(callable(scorer(method)) for method in METHODS if method != "all")
    assert {method: sees(method) for method in METHODS} == {
        "all": "nothing",
        "q2c": "context and question",
        "q2c+draft": "context and question, the sender's draft",
        "snapkv": "context",
        "snapkv+question": "context and question",
        "h2o": "context",
        "streaming": "nothing",
        "random": "nothing",
        "press": "context",
    }


def test_layers_with_a_sliding_window_have_no_vote():
    shape = CacheShape(2, 2, TOKENS, 8, "bfloat16", ((1, 10),))
    question = peaks(10)
    question[1] = peaks(25)[1]
    selection = Selection("q2c", Amount(5, "count"), sinks=2, recent=2, pool=1)
    chosen = choose_positions(Evidence(question=question, question_tokens=1), selection, shape)
    assert chosen.tolist() == [0, 1, 10, 38, 39]
