"""Turns at the model: a peer gets its steps however many answers another has on their way."""

from __future__ import annotations

import threading

import pytest

from kvlink.agent.turns import Turns
from tests.limits import HANGS_S


def test_items_come_as_they_are_made():
    assert list(Turns().each("anna", lambda: iter("abc"))) == list("abc")


def test_an_error_of_a_step_gives_the_turn_back():
    turns = Turns()

    def broken():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(turns.each("anna", broken))
    assert list(turns.each("bert", lambda: iter("x"))) == ["x"]


def test_peers_step_in_turn_however_many_answers_each_has():
    turns, order = Turns(), []
    first, all_wait = threading.Event(), threading.Event()

    def steps(who: str):
        for _ in range(6):
            order.append(who)
            yield who

    def held():
        first.set()
        all_wait.wait(HANGS_S)
        yield "held"

    threads = [threading.Thread(target=lambda: list(turns.each("greedy", held)))]
    threads[0].start()
    first.wait(HANGS_S)
    for who in ("greedy", "greedy", "greedy", "honest"):
        threads.append(threading.Thread(target=lambda who=who: list(turns.each(who, lambda: steps(who)))))
        threads[-1].start()
    while sum(map(len, turns._waiting.values())) < 4:
        pass
    all_wait.set()
    for thread in threads:
        thread.join(HANGS_S)
    until_done = order[: len(order) - order[::-1].index("honest")]
    assert until_done.count("greedy") <= 6 + 3, "about one step of the other between two of its own"
