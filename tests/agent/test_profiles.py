"""Profiles that senders send ahead: a peer keeps its own, however many another sends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvlink.agent.profiles import MOST, UNUSED_S, Profiles
from kvlink.errors import BusyError, LimitError
from kvlink.profile import MEMORY_PER_BYTE

MAX_PROFILES = 8
EACH = MAX_PROFILES // 2
FILE_BYTES = 100


class Clock:
    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        self.at += 1e-3
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def profiles(clock) -> Profiles:
    """Room for `MAX_PROFILES` files of `FILE_BYTES`."""
    return Profiles(MAX_PROFILES * FILE_BYTES * MEMORY_PER_BYTE, now=clock)


def add(profiles: Profiles, made: Any, peer: str) -> None:
    with profiles.room(FILE_BYTES, peer) as keep:
        keep(made)


def profile(name: str) -> Any:
    """As much of a profile as matters here."""
    return SimpleNamespace(digest=name.encode().ljust(16, b"\0"))


def held(profiles: Profiles) -> set[str]:
    return {bytes.fromhex(digest).rstrip(b"\0").decode() for digest in profiles}


def test_a_greedy_peer_pushes_out_its_own_only(profiles):
    add(profiles, profile("anna"), "anna")
    for number in range(3 * MAX_PROFILES):
        add(profiles, profile(f"m{number}"), "mallory")
    last = {f"m{number}" for number in range(3 * MAX_PROFILES)[-EACH:]}
    assert held(profiles) == {"anna", *last}


def test_a_newcomer_takes_the_place_of_somebody_beyond_their_share(profiles):
    for peer in ("mallory", "bert"):
        for number in range(EACH):
            add(profiles, profile(f"{peer}{number}"), peer)
    add(profiles, profile("anna"), "anna")
    assert held(profiles) >= {"anna"}
    assert len(profiles) == MAX_PROFILES


def test_nobody_within_their_share_makes_room(profiles):
    for number in range(MAX_PROFILES):
        add(profiles, profile(f"p{number}"), f"peer{number}")
    before = held(profiles)
    with pytest.raises(
        BusyError, match=f"for a profile: at most {MAX_PROFILES * FILE_BYTES * MEMORY_PER_BYTE} are held"
    ) as caught:
        add(profiles, profile("late"), "late")
    assert caught.value.retry_after_s
    assert held(profiles) == before


def test_what_nobody_names_for_long_goes(profiles, clock):
    for number in range(MAX_PROFILES):
        add(profiles, profile(f"p{number}"), f"peer{number}")
    clock.at += UNUSED_S - 1
    assert profiles[profile("p3").digest.hex()].digest == profile("p3").digest
    clock.at += 2
    add(profiles, profile("late"), "late")
    assert held(profiles) == {"p3", "late"}


def test_what_one_peer_lets_go_stays_while_another_holds_it(profiles):
    add(profiles, profile("shared"), "mallory")
    add(profiles, profile("shared"), "anna")
    for number in range(MAX_PROFILES):
        add(profiles, profile(f"m{number}"), "mallory")
    assert "shared" in held(profiles)


def test_the_least_recently_named_goes_first(profiles):
    for number in range(EACH):
        add(profiles, profile(f"p{number}"), "anna")
    _ = profiles[profile("p0").digest.hex()]
    add(profiles, profile("new"), "anna")
    assert "p0" in held(profiles)
    assert "p1" not in held(profiles)


def test_room_is_promised_before_anything_comes_and_free_again_where_nothing_did(profiles):
    with profiles.room(EACH * FILE_BYTES, "mallory"):
        with pytest.raises(BusyError), profiles.room(FILE_BYTES, "mallory"):
            pass
        add(profiles, profile("anna"), "anna")
    assert profiles.promised_bytes == 0
    add(profiles, profile("m"), "mallory")
    assert held(profiles) == {"anna", "m"}


def test_so_large_a_one_is_never_held(profiles):
    most = profiles.max_file_bytes
    assert most == EACH * FILE_BYTES
    with pytest.raises(LimitError, match=f"at most {most} are taken"), profiles.room(most + 1, "anna"):
        pass


def test_small_ones_are_counted_too(profiles):
    for number in range(2 * MOST):
        with profiles.room(1, "mallory") as keep:
            keep(profile(f"m{number}"))
    assert len(profiles) == MOST // 2


def test_the_same_again_takes_no_second_place(profiles):
    for _ in range(2 * MAX_PROFILES):
        add(profiles, profile("anna"), "anna")
    add(profiles, profile("bert"), "anna")
    assert held(profiles) == {"anna", "bert"}


def test_an_unknown_one_is_not_there(profiles):
    with pytest.raises(KeyError):
        profiles["00" * 16]
    assert "00" * 16 not in profiles
