"""The life of a transfer at the receiver: every decision by the table, with `now` as an argument."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, get_args

import pytest

from kvlink.errors import DeadlineError, KvlinkError, RemoteProtocolError
from kvlink.wire.lifecycle import EVENTS, TRANSITIONS, Event, Lifecycle, State, Waits, diagram

WAITS = Waits(start_s=5, idle_s=10, resume_s=60, whole_s=900)
DOCS = Path(__file__).resolve().parents[2] / "docs"

LIVES = {
    "it comes whole": ("resume frame frame end", "complete"),
    "it breaks and is resumed": ("resume frame cut resume frame end", "complete"),
    "a second stream takes it over": ("resume frame resume frame end", "complete"),
    "a stream that was silent goes on": ("resume frame idle frame end", "complete"),
    "nobody comes back": ("resume frame cut abandoned", "failed"),
    "a frame is wrong": ("resume frame refused", "failed"),
    "the first frame is wrong": ("resume refused", "failed"),
    "its sender gives it up": ("resume frame cancel", "cancelled"),
    "nothing comes after the manifest": ("resume idle", "forgotten"),
    "its stream ends after the manifest": ("resume cut", "forgotten"),
    "its deadline comes": ("resume frame frame deadline", "enough"),
    "its deadline comes while it is broken": ("resume frame cut deadline", "enough"),
    "it is resumed after its deadline": ("resume frame deadline resume", "enough"),
    "its deadline comes too early": ("resume frame late", "failed"),
    "it takes too long": ("resume frame overdue", "failed"),
    "it is cancelled after its end": ("resume frame end cancel", "complete"),
    "its cache expires": ("resume frame end gone", "forgotten"),
    "nobody asks for it any more": ("resume frame deadline abandoned", "forgotten"),
}


def lived(events: str, deadline_s: float = 0.0) -> Lifecycle:
    """A transfer that was begun at 0; its events came at 1, 2, …"""
    life = Lifecycle.begun(0.0, deadline_s)
    for now, event in enumerate(events.split(), 1):
        life = life.after(event, float(now), segments=1 if "deadline" in events else 0)  # type: ignore[arg-type]
    return life


@pytest.mark.parametrize(("events", "state"), LIVES.values(), ids=LIVES)
def test_a_life_ends_in_one_state(events, state):
    assert lived(events).state == state


def test_all_that_the_table_has_is_lived_through_or_an_end_of_what_is():
    reached = {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values())
    assert reached == set(get_args(State))
    assert {event for _, event in TRANSITIONS} == set(EVENTS) == set(get_args(Event))


@pytest.mark.parametrize("state", get_args(State))
@pytest.mark.parametrize("event", get_args(Event))
def test_what_the_table_does_not_have_is_refused_in_words(state, event):
    life = Lifecycle(state, 0.0, 0.0, why="the reason")
    if (state, event) in TRANSITIONS:
        assert life.after(event, 1.0).state == TRANSITIONS[state, event]
    else:
        with pytest.raises(KvlinkError, match=f"the reason|{state}"):
            life.after(event, 1.0)


@pytest.mark.parametrize("state", ["failed", "cancelled", "forgotten"])
def test_an_end_that_left_nothing_is_final(state):
    assert not any(before == state for before, _ in TRANSITIONS)
    assert Lifecycle(state, 0.0, 0.0).due(1e9, WAITS) is None


@pytest.mark.parametrize("state", ["complete", "enough"])
def test_what_is_held_stays_held_until_nobody_wants_it(state):
    assert {after for (before, _), after in TRANSITIONS.items() if before == state} == {state, "forgotten"}


class TestStreams:
    """Of two streams the later one feeds the transfer; the earlier one's connection is taken for dead."""

    def test_a_frame_of_a_stream_that_was_taken_over_is_refused(self):
        life = lived("resume frame resume")
        with pytest.raises(RemoteProtocolError, match="another stream has taken this transfer over"):
            life.after("frame", 4.0, stream=1)
        assert life.after("frame", 4.0, stream=2).state == "receiving"

    @pytest.mark.parametrize("event", ["cut", "idle", "refused"])
    def test_its_end_counts_for_nothing(self, event):
        life = lived("resume frame resume")
        assert life.after(event, 4.0, stream=1) is life
        assert life.after(event, 4.0, stream=2).state in ("broken", "failed")

    def test_a_frame_after_the_end_says_which_end(self):
        life = lived("resume frame").after("overdue", 3.0, why="not complete within 900 s")
        with pytest.raises(DeadlineError, match="this transfer is over: not complete within 900 s"):
            life.after("frame", 4.0, stream=1)

    def test_a_transfer_that_has_failed_needs_a_new_name(self):
        life = lived("resume frame").after("refused", 3.0, why="expected sequence 1")
        with pytest.raises(RemoteProtocolError, match="has failed: expected sequence 1; .* an id of its own"):
            life.after("resume", 4.0)


class TestTime:
    """What time alone brings, and not a moment earlier. Begun at 0, the last event at `last`."""

    DUE: ClassVar = {
        "silent after its manifest": ("resume", 1, 5, "idle"),
        "silent in the middle": ("resume frame", 2, 10, "idle"),
        "each frame sets the clock back": ("resume frame frame frame", 4, 10, "idle"),
        "broken": ("resume frame cut", 2, 60, "abandoned"),
        "held, and nobody asks": ("resume frame end", 3, 60, "abandoned"),
    }

    @pytest.mark.parametrize(("events", "last", "wait_s", "event"), DUE.values(), ids=DUE)
    def test_waits_run_from_the_last_frame_or_stream(self, events, last, wait_s, event):
        life = lived(events)
        assert life.due(last + wait_s - 0.01, WAITS) is None
        assert life.due(last + wait_s, WAITS) == event
        assert life.next_due(WAITS) == (last + wait_s, event)

    @pytest.mark.parametrize("events", ["resume", "resume frame", "resume frame cut"])
    def test_no_transfer_takes_longer_than_any_may(self, events):
        patient = Waits(1e6, 1e6, 1e6, whole_s=900)
        assert lived(events).due(899.9, patient) is None
        assert lived(events).due(900, patient) == "overdue"

    @pytest.mark.parametrize("events", ["resume", "resume frame", "resume frame cut"])
    @pytest.mark.parametrize(("segments", "event"), [(0, "late"), (1, "deadline"), (3, "deadline")])
    def test_a_deadline_is_enough_where_a_segment_has_closed(self, events, segments, event):
        life = Lifecycle.begun(0.0, deadline_s=4.0)
        for name in events.split():
            life = life.after(name, 1.0, segments=segments)
        if life.segments != segments:
            return  # no segment closes before the first frame
        assert life.due(3.9, WAITS) is None
        assert life.due(4.0, WAITS) == event

    def test_a_resume_does_not_move_the_deadline(self):
        life = lived("resume frame cut resume frame", deadline_s=7.0)
        assert life.next_due(WAITS) == (7.0, "late")

    def test_without_a_deadline_there_is_none(self):
        assert lived("resume frame").next_due(WAITS) == (12.0, "idle")

    def test_a_transfer_that_is_held_has_no_deadline_any_more(self):
        assert lived("resume frame end", deadline_s=4.0).due(50, WAITS) is None


def test_the_documentation_shows_the_table_as_it_is():
    assert diagram() in (DOCS / "wire-format.md").read_text(encoding="utf-8")
