"""What an agent holds: bounded in bytes and in time."""

from __future__ import annotations

import pytest

from kvlink.agent.store import Store
from kvlink.errors import LimitError, NotFoundError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Store[str]:
    return Store("cache", max_bytes=100, lifetime_s=10.0, now=clock)


def test_values_come_back_by_ids_that_cannot_be_guessed(store):
    keys = {store.put("x", 1) for _ in range(50)}
    assert len(keys) == 50
    assert all(len(key) >= 22 for key in keys)
    assert store.get(keys.pop()) == "x"


def test_values_expire(store, clock):
    key = store.put("x", 10)
    clock.now += 11
    with pytest.raises(NotFoundError, match="expired"):
        store.get(key)
    assert store.held_bytes == 0


def test_a_caller_can_shorten_a_lifetime_but_not_lengthen_it(store, clock):
    short, long = store.put("a", 10, 2.0), store.put("b", 10, 1e9)
    clock.now += 3
    with pytest.raises(NotFoundError):
        store.get(short)
    clock.now += 8
    with pytest.raises(NotFoundError):
        store.get(long)


def test_the_least_recently_used_makes_room(store):
    old, new = store.put("old", 40), store.put("new", 40)
    store.get(old)
    store.put("third", 40)
    assert store.get(old) == "old"
    with pytest.raises(NotFoundError):
        store.get(new)


def test_what_can_never_fit_is_refused_and_pushes_nothing_out(store):
    key = store.put("x", 90)
    with pytest.raises(LimitError, match="at most 100"):
        store.put("y", 101)
    assert store.get(key) == "x"


def test_promised_room_counts(store):
    store.reserve(60)
    with pytest.raises(LimitError, match="60 promised"):
        store.put("x", 50)
    store.release(60)
    store.put("x", 50)


def test_deleting_twice_is_an_error(store):
    key = store.put("x", 1)
    store.delete(key)
    with pytest.raises(NotFoundError):
        store.delete(key)
