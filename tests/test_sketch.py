"""Sketches: what counts as one model, what is refused, and what is no sketch."""

from __future__ import annotations

import pytest

from kvlink.errors import IdentityError
from kvlink.sketch import GROUPS, MOST_LAYERS, MOST_NUMBER, STEPS, TOLERANCE, Sketch, chosen_layers

ROW = 1 + GROUPS


def sketch(layers: int = 4, **changed: int) -> Sketch:
    """Some numbers; `n7=3` adds 3 to the number with index 7."""
    numbers = [(37 * i * i) % 5000 - 2500 for i in range(2 * ROW * min(layers, MOST_LAYERS))]
    for name, by in changed.items():
        numbers[int(name[1:])] += by
    return Sketch(layers, tuple(numbers))


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 8, 9, 30, 80, 4096])
def test_layers_are_spread_and_the_last_is_among_them(layers):
    found = chosen_layers(layers)
    assert len(found) == min(layers, MOST_LAYERS) == len(set(found))
    assert found[-1] == layers - 1
    assert found[0] >= 0
    assert max(b - a for a, b in zip((-1, *found), found, strict=False)) <= -(-layers // len(found))


def test_a_sketch_matches_itself():
    sketch().require_match(sketch())


def test_one_group_may_differ_as_a_token_of_another_expert_does():
    sketch().require_match(sketch(n1=STEPS))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n1": STEPS, "n2": STEPS}, "keys of layer 0"),
        ({"n6": STEPS, "n9": -STEPS}, "values of layer 0"),
        ({"n10": STEPS // 100}, "keys of layer 1"),
        ({"n5": -STEPS // 100}, "values of layer 0"),
        ({"n36": 40, "n37": 40}, "values of layer 3"),
    ],
)
def test_two_groups_or_the_size_may_not(changes, named):
    for here, there in ((sketch(), sketch(**changes)), (sketch(**changes), sketch())):
        with pytest.raises(IdentityError, match=f"from the {named} on"):
            here.require_match(there)


def test_the_tolerance_is_where_it_says():
    inside, beyond = int(STEPS * TOLERANCE), int(STEPS * TOLERANCE) + 1
    sketch().require_match(sketch(n1=inside, n2=inside))
    with pytest.raises(IdentityError, match="0.22% of their size, at most 0.20%"):
        sketch().require_match(sketch(n1=beyond, n2=beyond))


def test_no_sketch_and_another_number_of_layers_are_refused():
    with pytest.raises(IdentityError, match="tells no sketch"):
        sketch().require_match(None)
    with pytest.raises(IdentityError, match="here 4 layers, at the peer 5"):
        sketch(4).require_match(sketch(5))


@pytest.mark.parametrize(
    ("layers", "numbers", "message"),
    [
        (0, (), "expected"),
        (-1, (0,) * 10, "expected"),
        (1, (), "expected 10 numbers"),
        (1, (0,) * 11, "expected 10 numbers"),
        (2**31, (0,) * 10, "expected 80 numbers"),
        (1, (MOST_NUMBER + 1, *(0,) * 9), "not within"),
        (1, (0,) * 9 + (-MOST_NUMBER - 1,), "not within"),
    ],
)
def test_what_is_no_sketch_is_refused(layers, numbers, message):
    with pytest.raises(IdentityError, match=message):
        Sketch(layers, numbers)


def test_the_wildest_numbers_are_compared_without_overflow():
    wild, tame = (MOST_NUMBER,) * 10, (-MOST_NUMBER,) * 10
    for one, two in ((wild, tame), (tame, wild)):
        with pytest.raises(IdentityError, match="differ from"):
            Sketch(1, one).require_match(Sketch(1, two))
