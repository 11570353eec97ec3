"""Admission: how many may work at a time, who waits, and for how long.

A full agent lets callers wait their turn rather than fall over, one of each peer in turn, so that a
peer with many calls does not starve one with few; beyond the queue it says when to try again. No peer
has more than its share of the places and of the queue, and a full queue makes way for who waits less.

Does not know: what the work is. Place on the path: in front of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from types import TracebackType
from typing import Self

from kvlink.agent.shares import half
from kvlink.errors import BusyError


class Ticket:
    """A place that was given; `leave` gives it back, once. Also a context manager."""

    def __init__(self, gate: Gate, who: str) -> None:
        self._gate: Gate | None = gate
        self._who = who

    def leave(self) -> None:
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate._left(self._who)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class Gate:
    """`places` at a time, `places_each` for one peer (0: half); `waiting` more in all, half of them for
    one peer, wait up to `wait_s`. For one event loop.
    """

    def __init__(
        self, what: str, places: int, *, places_each: int = 0, waiting: int = 64, wait_s: float = 10.0
    ) -> None:
        self._what = what
        self.places = places
        self._places_each = places_each or half(places)
        self._waiting, self._waiting_each = waiting, half(waiting)
        self._wait_s = wait_s
        self._inside: Counter[str] = Counter()
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def inside(self) -> int:
        """How many have a place."""
        return self._inside.total()

    @property
    def queued(self) -> int:
        """How many wait for one."""
        return sum(len(queue) for queue in self._queues.values())

    async def enter(self, who: str = "") -> Ticket:
        """Wait for a place. Raises BusyError where the queue is full or the wait too long."""
        if not self.places:
            raise self._busy()
        if not self._queues.get(who) and self._free(who):
            self._inside[who] += 1
            return Ticket(self, who)
        mine = len(self._queues.get(who, ()))
        if mine >= self._waiting_each or (self.queued >= self._waiting and not self._make_way(mine)):
            raise self._busy()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(who, deque()).append(turn)
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._wait_s)
        except BaseException as error:
            if turn.done() and not turn.cancelled() and not turn.exception():  # a place came in that moment
                self._left(who)
            else:
                turn.cancel()
                self._forget(who, turn)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise
        return Ticket(self, who)

    def _busy(self) -> BusyError:
        return BusyError(
            f"at most {self.places} {self._what} at a time, {self._places_each} of one peer, "
            f"{self.queued} wait; try again later",
            min(max(self._wait_s / 4, 0.5), 5.0),
        )

    def _free(self, who: str) -> bool:
        return self._inside.total() < self.places and self._inside[who] < self._places_each

    def _left(self, who: str) -> None:
        self._inside[who] -= 1
        if not self._inside[who]:
            del self._inside[who]
        self._admit()

    def _admit(self) -> None:
        """Give free places to those who wait: the peer that waits longest for its turn goes first."""
        progress = True
        while progress:
            progress = False
            for who in list(self._queues):
                if self._free(who):
                    turn = self._queues[who].popleft()
                    self._queues.move_to_end(who)
                    if not self._queues[who]:
                        del self._queues[who]
                    self._inside[who] += 1
                    turn.set_result(None)
                    progress = True
                    break

    def _make_way(self, mine: int) -> bool:
        """Send the newest waiter of the peer with most of them away for one that has `mine`."""
        who = max(self._queues, key=lambda peer: len(self._queues[peer]), default="")
        longest = self._queues.get(who, deque())
        if len(longest) <= mine + 1:
            return False
        turn = longest[-1]
        self._forget(who, turn)
        turn.set_exception(self._busy())
        return True

    def _forget(self, who: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(who)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[who]
