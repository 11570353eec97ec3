"""What an agent holds: bounded in bytes and in time."""

from __future__ import annotations

import sys

import pytest

from kvlink.agent.shares import Whose
from kvlink.agent.store import Store
from kvlink.errors import AccessError, BusyError, LimitError, NotFoundError


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
    return Store("cache", max_bytes=100, lifetime_s=10.0, now=clock, max_peer_bytes=100)


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
    with pytest.raises(LimitError, match="60 are taken"):
        store.put("x", 50)
    store.release(60)
    store.put("x", 50)


def test_deleting_twice_is_an_error(store):
    key = store.put("x", 1)
    store.delete(key)
    with pytest.raises(NotFoundError):
        store.delete(key)


def test_values_are_there_for_their_owner_and_readers_only(store):
    key = store.put("x", 1, whose=Whose("anna", frozenset({"bert"}), asker="dora"))
    for who in ("anna", "bert", "dora"):
        assert store.get(key, who) == "x"
    for call in (store.get, store.delete):
        with pytest.raises(NotFoundError) as refused:
            call(key, "carl")
        with pytest.raises(NotFoundError) as unknown:
            call("unknown", "carl")
        assert str(refused.value) == str(unknown.value), "trying tells nothing"


@pytest.mark.parametrize(
    ("who", "may"), [("anna", True), ("dora", True), ("bert", False), ("carl", False), ("", False)]
)
def test_its_owner_and_who_asked_for_it_may_remove_a_value(store, who, may):
    key = store.put("x", 1, whose=Whose("anna", frozenset({"bert"}), asker="dora"))
    if may:
        store.delete(key, who)
    else:
        with pytest.raises(AccessError if who == "bert" else NotFoundError):
            store.delete(key, who)
    assert (key in store) is not may


def test_a_value_in_use_stays_whole_until_its_user_is_done(clock):
    wiped: list[str] = []
    store: Store[str] = Store("cache", 100, 10.0, clock, max_peer_bytes=100, wipe=wiped.append)
    key = store.put("x", 60)
    with store.lease(key) as value:
        clock.now += 11
        assert key not in store
        assert value == "x"
        assert wiped == []
        with pytest.raises(BusyError):
            store.put("y", 60)  # its memory is not free yet
    assert wiped == ["x"]
    store.put("y", 60)


@pytest.mark.parametrize("end", ["expire", "delete", "push out"])
def test_what_is_gone_is_wiped(clock, end):
    wiped: list[str] = []
    store: Store[str] = Store("cache", 100, 10.0, clock, max_peer_bytes=100, wipe=wiped.append)
    key = store.put("x", 60)
    if end == "expire":
        clock.now += 11
        store.sweep()
    elif end == "delete":
        store.delete(key)
    else:
        store.put("y", 60)
    assert wiped == ["x"]


def test_one_owner_has_a_bound_of_its_own(clock):
    store: Store[str] = Store("cache", 100, 10.0, clock, max_peer_bytes=50)
    first = store.put("a1", 40, whose=Whose("anna"))
    other = store.put("b", 40, whose=Whose("bert"))
    store.put("a2", 40, whose=Whose("anna"))
    with pytest.raises(NotFoundError):
        store.get(first, "anna")
    assert store.get(other, "bert") == "b", "somebody else's value made no room"
    with pytest.raises(LimitError, match="at most 50 are held for one peer"):
        store.put("a3", 51, whose=Whose("anna"))


def test_ones_own_values_make_room_before_those_of_others(store):
    older = store.put("b", 40, whose=Whose("bert"))
    own = store.put("a", 40, whose=Whose("anna"))
    store.put("a2", 40, whose=Whose("anna"))
    assert store.get(older, "bert") == "b"
    with pytest.raises(NotFoundError):
        store.get(own, "anna")


def test_a_value_that_nobody_has_used_yet_makes_no_room_for_a_while(clock):
    store: Store[str] = Store("cache", 100, 60.0, clock, max_peer_bytes=100, fresh_s=5.0)
    key = store.put("x", 60)
    with pytest.raises(BusyError, match="try again later") as caught:
        store.put("y", 60)
    assert 0 < caught.value.retry_after_s <= 5
    clock.now += 6
    store.put("y", 60)
    with pytest.raises(NotFoundError):
        store.get(key)


def work_of(action) -> int:
    """Calls of functions that an action makes: its cost on any machine."""
    count = [0]

    def counted(frame, event, argument):
        count[0] += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count[0]


def filled(values: int) -> Store[str]:
    store: Store[str] = Store("context", values * 10, 3600.0, max_peer_bytes=values * 10)
    for _ in range(values - 1):
        store.put("x", 10)
    return store


def test_what_a_call_costs_does_not_grow_with_what_is_held():
    few, many = filled(50), filled(2000)
    assert work_of(lambda: many.put("x", 10)) <= 2 * work_of(lambda: few.put("x", 10))
    key = many.put("x", 10)
    assert work_of(lambda: many.get(key)) < 50
    assert work_of(lambda: many.held_bytes) < 50


def test_one_large_value_in_place_of_many_small_ones_costs_what_there_are():
    few, many = filled(100), filled(2000)
    assert work_of(lambda: many.put("x", 10_000)) <= 40 * work_of(lambda: few.put("x", 500))
    assert len(many) == 1001 and many.held_bytes == 20_000


def test_a_value_under_a_known_key_takes_the_place_of_the_one_before(store):
    store.put("x", 60, key="k")
    store.put("y", 60, key="k")
    assert store.get("k") == "y"
    assert store.held_bytes == 60
