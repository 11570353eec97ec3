"""A receiver, a generator, a sender that say what cannot be: every lie is refused, every honest course passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.errors import RemoteProtocolError
from kvlink.transport.api import Ask, Piece, Progress, PushStatus
from kvlink.transport.expected import Answered, Delivering, Pushing

FRAMES = 10


def accepted(number: int) -> PushStatus:
    return PushStatus("accepted", number)


def durable(number: int) -> PushStatus:
    return PushStatus("durable", number)


COMPLETE = PushStatus("complete", FRAMES, "id")
ALL = FRAMES - 1

LIES = {
    "a frame beyond the transfer": [accepted(2**62)],
    "a frame one beyond": [accepted(FRAMES + 1)],
    "kept before accepted": [durable(1)],
    "kept more than was sent": [accepted(1), 3, durable(5)],
    "kept nothing": [accepted(1), 3, durable(0)],
    "kept twice the same": [accepted(1), 3, durable(4), durable(4)],
    "kept less than before": [accepted(1), 5, durable(4), durable(3)],
    "complete at once after accepting": [accepted(1), COMPLETE],
    "complete before the last frame": [accepted(1), ALL - 1, COMPLETE],
    "complete without a cache": [accepted(1), ALL, PushStatus("complete", FRAMES)],
    "complete twice": [accepted(1), ALL, COMPLETE, COMPLETE],
    "kept after complete": [accepted(1), ALL, COMPLETE, durable(FRAMES)],
    "failed, in a stream that takes frames": [accepted(1), PushStatus("failed", 1)],
    "cancelled": [PushStatus("cancelled", 1)],
}
ENOUGH = PushStatus("enough", 5, "id")
EARLY_LIES = {
    "enough at once after accepting": [accepted(1), ENOUGH],
    "enough of more than was sent": [accepted(1), 3, ENOUGH],
    "enough of the manifest alone": [accepted(1), 5, PushStatus("enough", 1, "id")],
    "enough without a cache": [accepted(1), 5, PushStatus("enough", 5)],
    "enough twice": [accepted(1), 5, ENOUGH, ENOUGH],
    "enough, then complete": [accepted(1), ALL, ENOUGH, COMPLETE],
}
FRESH_LIES = {
    "complete, though nothing was ever sent": [COMPLETE],
    "more than the first frame, though no more was ever sent": [accepted(2)],
    "all frames, though no more than one was ever sent": [accepted(FRAMES), COMPLETE],
}


def play(pushing: Pushing, course: list) -> list[bool]:
    """Numbers are frames whose sending begins."""
    said = []
    for step in course:
        if isinstance(step, int):
            pushing.begun = step
        else:
            said.append(pushing.told(step))
    return said


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", LIES)
def test_what_a_receiver_cannot_say_is_refused(name, fresh):
    *before, last = LIES[name]
    pushing = Pushing(lambda: FRAMES, fresh)
    play(pushing, before)
    with pytest.raises(RemoteProtocolError):
        play(pushing, [last])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", EARLY_LIES)
def test_what_a_receiver_cannot_have_enough_of_is_refused(name, fresh):
    *before, last = EARLY_LIES[name]
    pushing = Pushing(lambda: FRAMES, fresh, early=True)
    play(pushing, before)
    with pytest.raises(RemoteProtocolError):
        play(pushing, [last])


def test_enough_is_said_of_a_transfer_with_a_deadline_only():
    play(Pushing(lambda: FRAMES, early=True), [accepted(1), 5, ENOUGH])
    play(Pushing(lambda: FRAMES, early=True), [ENOUGH])  # of one that was tried before
    with pytest.raises(RemoteProtocolError, match="says enough in a stream that takes frames"):
        play(Pushing(lambda: FRAMES), [accepted(1), 5, ENOUGH])
    with pytest.raises(RemoteProtocolError):
        play(Pushing(lambda: FRAMES, fresh=True, early=True), [ENOUGH])


@pytest.mark.parametrize("name", FRESH_LIES)
def test_a_receiver_has_nothing_of_a_fresh_transfer(name):
    with pytest.raises(RemoteProtocolError):
        play(Pushing(lambda: FRAMES, fresh=True), FRESH_LIES[name])
    play(Pushing(lambda: FRAMES), FRESH_LIES[name])  # of one that was tried before it may


@given(st.data(), st.integers(1, 40), st.booleans())
def test_every_honest_course_passes(data, count, fresh):
    pushing = Pushing(lambda: count, fresh)
    first = 1 if fresh else data.draw(st.integers(1, count))
    assert play(pushing, [accepted(0), accepted(first), accepted(0), accepted(first)]) == [
        False,
        True,
        False,
        False,
    ]
    assert pushing.begin_at == first
    kept = first
    for number in range(first, count):
        pushing.begun = number
        if data.draw(st.booleans()):
            upto = data.draw(st.integers(kept + 1, number + 1)) if kept <= number else kept
            if upto > kept:
                assert pushing.told(durable(upto))
                kept = upto
    assert pushing.told(COMPLETE)
    assert pushing.answered


def test_an_answer_has_an_end_and_bounds():
    def course(ask: Ask, *pieces: Piece) -> None:
        answered = Answered(ask)
        for piece in pieces:
            answered.told(piece)
        answered.end()

    course(Ask("c", "q", 2), Piece("a", (1,)), Piece("b", (2,)), Piece("", done=True))
    for pieces, why in (
        ((Piece("a", (1,)),), "without its last piece"),
        ((Piece("a", (1, 2, 3)),), "at most 2 tokens"),
        ((Piece("", done=True), Piece("a", (1,))), "after its end"),
        ((Piece("世" * 1_000_000, (1,)), Piece("世" * 1_000_000, (1,))), "4,000,000 bytes"),
    ):
        with pytest.raises(RemoteProtocolError, match=why):
            course(Ask("c", "q", 2), *pieces)


def test_a_delivery_goes_to_one_total_and_is_done_once():
    done = Progress(9, 9, True, "id")

    def course(*told: Progress) -> None:
        delivering = Delivering()
        for progress in told:
            delivering.told(progress)
        delivering.end()

    course(Progress(0, 9), Progress(4, 9), Progress(4, 9), done)
    for told, why in (
        ((Progress(0, 9),), "without being done"),
        ((Progress(10, 9),), "10 of 9 bytes"),
        ((Progress(0, 9), Progress(0, 10)), "0 of 10 bytes"),
        ((done, done), "after its end"),
        ((Progress(9, 9, True),), "names no cache"),
    ):
        with pytest.raises(RemoteProtocolError, match=why):
            course(*told)
