"""What a peer can say at this point of a call, beyond what any message may hold.

    Pushing     the receiver's statuses of one transfer that is being pushed
    Answered    the pieces of one answer
    Delivering  the progress of one delivery

Each raises RemoteProtocolError where the peer says what cannot be: a lie, or another protocol.

Does not know: sockets. Place on the path: in the clients, behind the table of fields.
"""

from __future__ import annotations

from collections.abc import Callable

from kvlink.bounds import ANSWER
from kvlink.errors import RemoteProtocolError
from kvlink.transport.api import Ask, Piece, Progress, PushStatus

_MOST_PIECES = 1_000_000
"""Tokens of an answer where the caller has set no bound."""


class Pushing:
    """A transfer on its way to a receiver; `count()`: its frames, None while that is not known.

    `fresh`: nothing of it was ever sent, so that the receiver can have nothing but what it gets now.
    `early`: its manifest names a deadline, at which the receiver may have enough.
    `begun`: the last frame whose sending has begun; whoever writes frames says so before each.
    """

    def __init__(self, count: Callable[[], int | None], fresh: bool = False, early: bool = False) -> None:
        self._count = count
        self._fresh, self._early = fresh, early
        self._durable = 0
        self._over = False
        self.begun = 0
        self.begin_at = 0
        """The frame to go on with, once the receiver has accepted; 0 before."""

    @property
    def answered(self) -> bool:
        """Whether the receiver has said anything that counts."""
        return bool(self.begin_at) or self._over

    def told(self, status: PushStatus) -> bool:
        """Take a status; whether it says anything new (else it is a sign of life)."""
        if self._over:
            raise RemoteProtocolError(f"the receiver says {status.state} after the end of the transfer")
        if status.state == "accepted":
            return self._accepted(status.next_sequence)
        if status.state == "durable":
            return self._kept(status.next_sequence)
        if status.state == "complete":
            return self._complete(status)
        if status.state == "enough" and self._early:
            return self._enough(status)
        raise RemoteProtocolError(f"the receiver says {status.state} in a stream that takes frames")

    def _accepted(self, number: int) -> bool:
        if self.begin_at or not number:
            return False
        count = self._count()
        most = 1 if self._fresh else count
        if most is not None and number > most:
            raise RemoteProtocolError(
                f"the receiver wants frame {number}; expected at most frame {most}"
                + (
                    ", it can have no more than the manifest"
                    if self._fresh
                    else f" of a transfer of {count} frames"
                )
            )
        self.begin_at, self.begun = number, number - 1
        return True

    def _kept(self, number: int) -> bool:
        if not self._durable < number <= self.begun + 1 or not self.begin_at:
            raise RemoteProtocolError(
                f"the receiver has kept the frames before {number}; expected from {self._durable + 1} "
                f"to {self.begun + 1}, which is what was sent"
            )
        self._durable = number
        return True

    def _complete(self, status: PushStatus) -> bool:
        there = not self.begin_at and not self._fresh  # an earlier attempt has brought it
        count = self._count()
        if not there and (count is None or self.begun < count - 1):
            raise RemoteProtocolError(
                f"the receiver says complete after frame {self.begun}; the last one was not sent"
            )
        if not status.cache_id:
            raise RemoteProtocolError("the receiver says complete and names no cache")
        self._over = True
        return True

    def _enough(self, status: PushStatus) -> bool:
        there = not self.begin_at and not self._fresh
        count, number = self._count(), status.next_sequence
        most = count if there else self.begun + 1
        if number < 2 or (most is not None and number > most):
            raise RemoteProtocolError(
                f"the receiver has enough of the frames before {number}; "
                f"expected from 2 to {most}, which is what was sent"
            )
        if not status.cache_id:
            raise RemoteProtocolError("the receiver says enough and names no cache")
        self._over = True
        return True


class Answered:
    """The pieces of one answer: no more tokens than were asked for, no more text than an answer has."""

    def __init__(self, ask: Ask) -> None:
        self._most_tokens = ask.max_new_tokens or _MOST_PIECES
        self._tokens = self._bytes = 0
        self._done = False

    def told(self, piece: Piece) -> None:
        self._tokens += len(piece.token_ids)
        self._bytes += len(piece.text.encode())
        if self._done:
            raise RemoteProtocolError("the answer goes on after its end")
        if self._tokens > self._most_tokens:
            raise RemoteProtocolError(f"expected at most {self._most_tokens} tokens, the answer has more")
        if self._bytes > ANSWER.most:
            raise RemoteProtocolError(f"an answer has {ANSWER}, this one more")
        self._done = piece.done

    def end(self) -> None:
        """The stream is over."""
        if not self._done:
            raise RemoteProtocolError("the answer ends without its last piece")


class Delivering:
    """The progress of one delivery: towards a total that never grows, and done once."""

    def __init__(self) -> None:
        self._total = 0
        self._done = False

    def told(self, progress: Progress) -> None:
        total = self._total or progress.total_bytes
        if self._done:
            raise RemoteProtocolError("the delivery goes on after its end")
        if progress.total_bytes > total or progress.sent_bytes > progress.total_bytes:
            raise RemoteProtocolError(
                f"{progress.sent_bytes} of {progress.total_bytes} bytes are delivered; expected no more than {total}"
            )
        if progress.done and not progress.cache_id:
            raise RemoteProtocolError("the delivery is done and names no cache")
        self._total, self._done = progress.total_bytes, progress.done

    def end(self) -> None:
        """The stream is over."""
        if not self._done:
            raise RemoteProtocolError("the delivery ends without being done")
