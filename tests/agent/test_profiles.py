"""Profiles that senders send ahead: a peer keeps its own, however many another sends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvlink.agent.profiles import MAX_PROFILES, UNUSED_S, Profiles
from kvlink.errors import BusyError

EACH = MAX_PROFILES // 2


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
    return Profiles(clock)


def profile(name: str) -> Any:
    """As much of a profile as matters here."""
    return SimpleNamespace(digest=name.encode().ljust(16, b"\0"))


def held(profiles: Profiles) -> set[str]:
    return {bytes.fromhex(digest).rstrip(b"\0").decode() for digest in profiles}


def test_a_greedy_peer_pushes_out_its_own_only(profiles):
    profiles.add(profile("anna"), "anna")
    for number in range(3 * MAX_PROFILES):
        profiles.add(profile(f"m{number}"), "mallory")
    last = {f"m{number}" for number in range(3 * MAX_PROFILES)[-EACH:]}
    assert held(profiles) == {"anna", *last}


def test_a_newcomer_takes_the_place_of_somebody_beyond_their_share(profiles):
    for peer in ("mallory", "bert"):
        for number in range(EACH):
            profiles.add(profile(f"{peer}{number}"), peer)
    profiles.add(profile("anna"), "anna")
    assert held(profiles) >= {"anna"}
    assert len(profiles) == MAX_PROFILES


def test_nobody_within_their_share_makes_room(profiles):
    for number in range(MAX_PROFILES):
        profiles.add(profile(f"p{number}"), f"peer{number}")
    before = held(profiles)
    with pytest.raises(BusyError, match=f"at most {MAX_PROFILES} profiles") as caught:
        profiles.add(profile("late"), "late")
    assert caught.value.retry_after_s
    assert held(profiles) == before


def test_what_nobody_names_for_long_goes(profiles, clock):
    for number in range(MAX_PROFILES):
        profiles.add(profile(f"p{number}"), f"peer{number}")
    clock.at += UNUSED_S - 1
    assert profiles[profile("p3").digest.hex()].digest == profile("p3").digest
    clock.at += 2
    profiles.add(profile("late"), "late")
    assert held(profiles) == {"p3", "late"}


def test_what_one_peer_lets_go_stays_while_another_holds_it(profiles):
    profiles.add(profile("shared"), "mallory")
    profiles.add(profile("shared"), "anna")
    for number in range(MAX_PROFILES):
        profiles.add(profile(f"m{number}"), "mallory")
    assert "shared" in held(profiles)


def test_the_least_recently_named_goes_first(profiles):
    for number in range(EACH):
        profiles.add(profile(f"p{number}"), "anna")
    _ = profiles[profile("p0").digest.hex()]
    profiles.add(profile("new"), "anna")
    assert "p0" in held(profiles)
    assert "p1" not in held(profiles)


def test_the_same_again_takes_no_second_place(profiles):
    for _ in range(2 * MAX_PROFILES):
        profiles.add(profile("anna"), "anna")
    profiles.add(profile("bert"), "anna")
    assert held(profiles) == {"anna", "bert"}


def test_an_unknown_one_is_not_there(profiles):
    with pytest.raises(KeyError):
        profiles["00" * 16]
    assert "00" * 16 not in profiles
