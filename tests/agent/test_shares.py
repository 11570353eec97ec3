"""Shares: whose values make room for whose, as a table and against a second reading of the rule."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvlink.agent.shares import Account, Movable, Shares, Whose, half
from kvlink.errors import BusyError, LimitError
from kvlink.transport.api import Caller

GONE = None
"""There is no room."""


def holding(held: str) -> tuple[list[Movable], Counter[Account]]:
    """`anna:30 bert:20! writer/anna:5`: values from the oldest on; `!` cannot be moved. Keys count from 0."""
    movable, taken = [], Counter()
    for at, text in enumerate(held.split()):
        who, _, size = text.partition(":")
        peer, _, asker = who.partition("/")
        account, nbytes = Account(peer, asker), int(size.rstrip("!"))
        taken[account] += nbytes
        if not size.endswith("!"):
            movable.append(Movable(str(at), account, nbytes, float(at)))
    return movable, taken


@pytest.mark.parametrize(
    ("why", "held", "newcomer", "nbytes", "goes"),
    [
        ("there is room", "anna:50 bert:30", "carl", 20, ""),
        ("alone one has what it may", "anna:60", "anna", 10, ""),
        ("above its bound: its own oldest goes", "anna:40 anna:30", "anna", 20, "0"),
        ("above its bound: nobody else's goes", "bert:20 anna:70!", "anna", 10, GONE),
        (
            "within its share, the other beyond: the other's oldest goes",
            "anna:40 anna:30 bert:30",
            "bert",
            20,
            "0",
        ),
        ("within its share, nobody beyond", "anna:33! bert:34 carl:33", "dora", 10, "1"),
        ("above its share: only its own", "anna:40 bert:30 bert:30", "bert", 20, "1"),
        ("above its share, and its own cannot go", "anna:40 bert:60!", "bert", 10, GONE),
        ("a newcomer as large as its share", "anna:70 bert:30", "carl", 33, "0"),
        ("a newcomer larger than its share pushes nobody out", "anna:50 bert:50", "carl", 40, GONE),
        ("what is in use does not go", "anna:70! bert:30", "carl", 20, GONE),
        ("several go", "anna:10 anna:10 anna:50 bert:30", "carl", 20, "0 1"),
        ("for one asker: its own", "writer/anna:30 writer/mallory:40", "writer/mallory", 20, "1"),
        (
            "an asker within its share",
            "writer/mallory:30 writer/mallory:30 writer/anna:10",
            "writer/anna",
            20,
            "0",
        ),
        (
            "an asker above its share, others' caches stay",
            "writer/anna:30 writer/mallory:40!",
            "writer/mallory",
            10,
            GONE,
        ),
        ("peers first, then askers", "writer/anna:35 writer/bert:35 other:30", "third", 30, "0"),
    ],
)
def test_who_makes_room(why, held, newcomer, nbytes, goes):
    movable, taken = holding(held)
    peer, _, asker = newcomer.partition("/")
    shares = Shares("value", 100, 70)
    if goes is GONE:
        with pytest.raises(
            BusyError, match=f"for a value: at most 100 .* {taken.total()} are taken"
        ) as caught:
            shares.make_room(nbytes, Account(peer, asker), movable, taken, 3.0)
        assert caught.value.retry_after_s == 3.0
    else:
        assert shares.make_room(nbytes, Account(peer, asker), movable, taken) == goes.split(), why


def test_what_can_never_be_held_is_refused():
    shares = Shares("value", 100)
    with pytest.raises(LimitError, match="at most 50 are held for one peer"):
        shares.make_room(51, Account("anna"), [], {})
    with pytest.raises(LimitError, match="at most 100 are held here"):
        shares.make_room(101, Account("anna"), [], {})


@pytest.mark.parametrize("seed", range(200))
def test_nobody_loses_a_value_to_somebody_who_has_more(seed):
    dice = random.Random(seed)
    peers = ["anna", "bert", "carl", "dora"][: dice.randint(2, 4)]
    shares, held = Shares("value", 1000, dice.choice([500, 700, 1000])), {}
    for step in range(60):
        mine, nbytes = Account(dice.choice(peers), dice.choice(["", "x", "y"])), dice.randint(1, 400)
        movable = [item for item in held.values() if dice.random() < 0.9]
        taken = Counter()
        for item in held.values():
            taken[item.account] += item.nbytes
        try:
            going = shares.make_room(nbytes, mine, movable, taken)
        except BusyError:
            continue
        lost = Counter()
        for key in going:
            item = held.pop(key)
            lost[item.account.peer] += item.nbytes
        held[str(step)] = Movable(str(step), mine, nbytes, float(step))
        used = Counter()
        for item in held.values():
            used[item.account.peer] += item.nbytes
        assert used.total() <= 1000
        assert used[mine.peer] <= shares.max_peer_bytes
        if set(lost) - {mine.peer}:
            assert used[mine.peer] <= 1000 // len(set(used) | set(lost)), (
                "beyond its share it took from others"
            )


@pytest.mark.parametrize(("whole", "each"), [(0, 1), (1, 1), (2, 1), (3, 2), (8, 4), (33, 17)])
def test_a_peer_has_half_and_at_least_one(whole, each):
    assert half(whole) == each


def test_what_a_call_leaves_counts_for_its_peer_and_who_asked():
    assert Whose.left_by(Caller("writer", asked_by="anna")).account == Account("writer", "anna")
    assert Whose.left_by(Caller(host="10.0.0.5")).account == Account("10.0.0.5")
