"""The life of a transfer at the receiver: a transition table, without I/O or clock.

    life = Lifecycle.begun(now)            the manifest was accepted
    life = life.after("frame", now, …)     each event makes a new value
    life.due(now, waits)                   the event that time alone brings, if one is due

Every transfer ends in exactly one state. `complete` and `enough` leave a cache that is held and answered
from: with `enough` its deadline came first, and the cache is that of the segments that had closed.

Does not know: frames, streams, locks, disks; `now` is an argument, in seconds on any clock that only goes forward.
Place on the path: under the receiver's inbound transfers, which do what a transition means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from kvlink.errors import DeadlineError, RemoteProtocolError

State = Literal[
    "opened", "receiving", "broken", "complete", "enough", "failed", "cancelled", "forgotten"
]  # fmt: skip
Event = Literal[
    "frame", "resume", "cut", "idle", "end", "refused", "cancel", "deadline", "late", "overdue", "abandoned", "gone",
]  # fmt: skip

TRANSITIONS: dict[tuple[State, Event], State] = {
    ("opened", "frame"): "receiving",
    ("opened", "resume"): "opened",
    ("opened", "cut"): "forgotten",
    ("opened", "idle"): "forgotten",
    ("opened", "refused"): "failed",
    ("opened", "late"): "failed",
    ("opened", "overdue"): "failed",
    ("opened", "cancel"): "cancelled",
    ("receiving", "frame"): "receiving",
    ("receiving", "resume"): "receiving",
    ("receiving", "cut"): "broken",
    ("receiving", "idle"): "broken",
    ("receiving", "end"): "complete",
    ("receiving", "deadline"): "enough",
    ("receiving", "refused"): "failed",
    ("receiving", "late"): "failed",
    ("receiving", "overdue"): "failed",
    ("receiving", "cancel"): "cancelled",
    ("broken", "frame"): "receiving",
    ("broken", "resume"): "receiving",
    ("broken", "cut"): "broken",
    ("broken", "deadline"): "enough",
    ("broken", "refused"): "failed",
    ("broken", "late"): "failed",
    ("broken", "overdue"): "failed",
    ("broken", "abandoned"): "failed",
    ("broken", "cancel"): "cancelled",
    ("complete", "resume"): "complete",
    ("complete", "cancel"): "complete",
    ("complete", "abandoned"): "forgotten",
    ("complete", "gone"): "forgotten",
    ("enough", "resume"): "enough",
    ("enough", "cancel"): "enough",
    ("enough", "abandoned"): "forgotten",
    ("enough", "gone"): "forgotten",
}
"""(state, event) → next state. Every other pair is refused, see `Lifecycle.after`."""

EVENTS: dict[Event, str] = {
    "frame": "a frame was taken; after `idle` its stream may still bring one",
    "resume": "a stream with the same manifest: from now on it alone may feed the transfer",
    "cut": "the stream that feeds it ended, or was given up",
    "idle": "that stream brought nothing for long",
    "end": "the end frame was taken, the cache is whole",
    "refused": "a frame was wrong",
    "cancel": "the peer that began it gives it up",
    "deadline": "its deadline has come, a segment has closed",
    "late": "its deadline has come, no segment has closed",
    "overdue": "it has taken longer than any transfer may",
    "abandoned": "nobody has come back for it",
    "gone": "its cache has expired or was deleted",
}
OF_A_STREAM = ("frame", "cut", "idle", "refused")
"""Events that a stream brings: of one that was taken over they count for nothing."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long a receiver waits, in seconds. `start_s`: for a frame after the manifest. `idle_s`: for the
    next one. `resume_s`: for a stream that resumes. `whole_s`: from the manifest to the end."""

    start_s: float
    idle_s: float
    resume_s: float
    whole_s: float


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Where a transfer stands. Times in seconds; `stream` numbers the streams that have fed it, the last one may.

    `deadline_at`: when its sender wants a usable cache. `segments`: those that have closed.
    """

    state: State
    began_at: float
    touched_at: float
    deadline_at: float = math.inf
    stream: int = 0
    segments: int = 0
    why: str = ""

    @classmethod
    def begun(cls, now: float, deadline_s: float = 0.0) -> Lifecycle:
        """A manifest was accepted. `deadline_s`: 0 where it names none."""
        return cls("opened", now, now, now + deadline_s if deadline_s else math.inf)

    @property
    def on_its_way(self) -> bool:
        return self.state in ("opened", "receiving", "broken")

    @property
    def held(self) -> bool:
        """Whether it has left a cache that can be answered from."""
        return self.state in ("complete", "enough")

    def after(
        self, event: Event, now: float, *, stream: int | None = None, segments: int = 0, why: str = ""
    ) -> Lifecycle:
        """The transfer after an event. `stream`: which one brought it. `segments`: with a frame, those that
        have closed. `why`: with an end, in words for the peer.

        Raises RemoteProtocolError for what the table does not have and for a frame of a stream that was taken
        over, DeadlineError for a frame after the end.
        """
        if event in OF_A_STREAM and stream is not None and stream != self.stream:
            if event == "frame":
                raise RemoteProtocolError("another stream has taken this transfer over")
            return self
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise self._refusal(event)
        if event == "frame":
            return replace(self, state=state, touched_at=now, segments=max(self.segments, segments))
        if event == "resume":
            return replace(self, state=state, touched_at=now, stream=self.stream + 1)
        return replace(
            self, state=state, touched_at=now if event == "end" else self.touched_at, why=why or self.why
        )

    def _refusal(self, event: Event) -> RemoteProtocolError | DeadlineError:
        if event == "resume":
            return RemoteProtocolError(
                f"frame 0: this transfer has {self.state}: {self.why}; a new attempt needs an id of its own"
            )
        if not self.on_its_way:
            return DeadlineError(f"this transfer is over: {self.why or self.state}")
        return RemoteProtocolError(f"{EVENTS[event]}: that cannot be of a transfer that is {self.state}")

    def next_due(self, waits: Waits) -> tuple[float, Event]:
        """When time alone brings the next event, and which one."""
        if not self.on_its_way:
            return self.touched_at + waits.resume_s, "abandoned"
        quiet: dict[State, tuple[float, Event]] = {
            "opened": (waits.start_s, "idle"),
            "receiving": (waits.idle_s, "idle"),
            "broken": (waits.resume_s, "abandoned"),
        }
        wait_s, event = quiet[self.state]
        ends: tuple[tuple[float, Event], ...] = (
            (self.deadline_at, "deadline" if self.segments else "late"),
            (self.began_at + waits.whole_s, "overdue"),
            (self.touched_at + wait_s, event),
        )
        return min(ends, key=lambda end: end[0])

    def due(self, now: float, waits: Waits) -> Event | None:
        """The event that time alone has brought by `now`, None where there is none."""
        at, event = self.next_due(waits)
        return event if self.state not in ("failed", "cancelled", "forgotten") and at <= now else None


def diagram() -> str:
    """The transition table as lines of text, for the documentation."""
    lines = [f"{state:9} ── {event:9} ──▶ {after}" for (state, event), after in TRANSITIONS.items()]
    return "\n".join([*lines, "any       ── anything else ──▶ refused, and as it was"])
