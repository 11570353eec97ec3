"""Turns at the model: threads that answer for several peers step one after the other, peer by peer.

A peer with many answers on their way gets as many steps as one with a single answer, so that who asks one
question beside it waits for twice as long as alone, not for as many times as there are answers.

Does not know: what a step is. Place on the path: between the model and the threads that drive it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_REMEMBERED = 1024
"""Peers whose last turn is known."""


class Turns:
    """One step at a time; of the peers that wait the one whose last turn is longest ago goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._waiting: dict[str, deque[object]] = {}
        self._had: OrderedDict[str, int] = OrderedDict()
        """The number of each peer's last turn; the oldest are forgotten."""
        self._count = 0

    def each(self, who: str, make: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The items of `make()`, each made in a turn of `who`'s."""
        items = make()
        while True:
            with self.turn(who):
                found = list(zip(range(1), items, strict=False))  # one item, or none at the end
            if not found:
                return
            yield found[0][1]

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Wait for a turn, and give it back at the end of the block."""
        me = object()
        with self._changed:
            self._waiting.setdefault(who, deque()).append(me)
            self._changed.wait_for(lambda: not self._taken and self._first() is me)
            self._waiting[who].popleft()
            if not self._waiting[who]:
                del self._waiting[who]
            self._taken = True
            self._count += 1
            self._had[who] = self._count
            self._had.move_to_end(who)
            if len(self._had) > _REMEMBERED:
                self._had.popitem(last=False)
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _first(self) -> object:
        return self._waiting[min(self._waiting, key=lambda who: self._had.get(who, 0))][0]
