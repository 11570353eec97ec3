"""What an agent holds: contexts under ids that cannot be guessed, with owners, lifetimes and memory bounds.

An id opens nothing by itself: a value is given to its owner, to who asked for it and to the readers that
the owner named, and is "not there" for everybody else. Readers cannot remove it. A value that somebody is
using stays whole until they are done, whatever happens to its id; then it is wiped.

Does not know: what is held, beyond its size. Place on the path: between a transfer and a question.
"""

from __future__ import annotations

import heapq
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvlink.agent.shares import Account, Movable, Shares, Whose
from kvlink.errors import AccessError, NotFoundError

T = TypeVar("T")

NOBODYS = Whose()

_RETRY_S = (0.5, 5.0)


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    nbytes: int
    whose: Whose
    expires_at: float
    last_used: float
    fresh_until: float
    users: int = 0
    gone: bool = False


class Store(Generic[T]):
    """Values by id. A use extends nothing but the order in which values make room.

    `max_bytes` bounds what is held and what is promised (`reserve`) together, `max_peer_bytes` the
    part of one peer (0: half). Whose values make room for whose is `shares`' business; of those the least
    recently used goes first. A value in use, and one that is younger than `fresh_s` and was never used, stays.
    What is larger than a bound raises LimitError, what only has no room now BusyError.
    `wipe` is called on a value that is gone once nobody uses it.
    """

    def __init__(
        self,
        what: str,
        max_bytes: int,
        lifetime_s: float,
        now: Callable[[], float] = time.monotonic,
        *,
        max_peer_bytes: int = 0,
        fresh_s: float = 0.0,
        wipe: Callable[[T], None] | None = None,
    ) -> None:
        self._what = what
        self._shares = Shares(what, max_bytes, max_peer_bytes)
        self.lifetime_s = lifetime_s
        self._now = now
        self._fresh_s = fresh_s
        self._wipe = wipe or (lambda _: None)
        self._entries: dict[str, _Entry[T]] = {}
        self._endings: list[tuple[float, str]] = []
        """A heap: when values expire, with some that are gone already."""
        self._held: Counter[Account] = Counter()
        self._leaving: Counter[Account] = Counter()
        self._reserved: Counter[Account] = Counter()
        self._lock = threading.RLock()

    def granted_s(self, asked_s: float) -> float:
        """The lifetime that a value gets: what was asked for, at most the store's; 0 asks for that."""
        return min(asked_s or self.lifetime_s, self.lifetime_s)

    def put(
        self, value: T, nbytes: int, lifetime_s: float = 0.0, *, whose: Whose = NOBODYS, key: str = ""
    ) -> str:
        """Hold a value; returns its id, 16 random bytes as text unless `key` says another.

        Raises LimitError, BusyError.
        """
        with self._lock:
            self._make_room(nbytes, whose.account)
            key = key or secrets.token_urlsafe(16)
            now = self._now()
            lasting = self.granted_s(lifetime_s)
            if key in self._entries:
                self._remove(key)
            self._entries[key] = _Entry(value, nbytes, whose, now + lasting, now, now + self._fresh_s)
            self._held[whose.account] += nbytes
            heapq.heappush(self._endings, (now + lasting, key))
            return key

    @contextmanager
    def lease(self, key: str, who: str = "") -> Iterator[T]:
        """The value of an id, whole until the block is left.

        Raises NotFoundError where it is unknown, has expired, or is none of `who`'s business: the
        three look the same from outside.
        """
        with self._lock:
            entry = self._find(key, who)
            entry.users += 1
            entry.last_used, entry.fresh_until = self._now(), 0.0
        try:
            yield entry.value
        finally:
            with self._lock:
                entry.users -= 1
                if entry.gone and not entry.users:
                    self._leaving[entry.whose.account] -= entry.nbytes
                    self._wipe(entry.value)

    def get(self, key: str, who: str = "") -> T:
        """The value of an id, for a look: it may be wiped at any moment. Raises NotFoundError."""
        with self._lock:
            entry = self._find(key, who)
            entry.last_used, entry.fresh_until = self._now(), 0.0
            return entry.value

    def search(self, match: Callable[[T], bool], who: str = "") -> str | None:
        """The id of the latest value that `who` may use and that `match`es; a look, not a use."""
        with self._lock:
            self._expire()
            for key, entry in reversed(self._entries.items()):
                if entry.whose.may_use(who) and match(entry.value):
                    return key
            return None

    def delete(self, key: str, who: str = "") -> None:
        """Forget a value. Raises NotFoundError, and AccessError where `who` may only use it."""
        with self._lock:
            self.check_removable(self._find(key, who).whose, who)
            self._remove(key)

    def sweep(self) -> None:
        """Forget what has expired, now rather than at the next call."""
        with self._lock:
            self._expire()

    def ids(self) -> set[str]:
        """The ids of what is held."""
        with self._lock:
            self._expire()
            return set(self._entries)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            self._expire()
            return key in self._entries

    def reserve(self, nbytes: int, whose: Whose = NOBODYS) -> None:
        """Promise room for something on its way; `release` gives it back. Raises LimitError, BusyError."""
        with self._lock:
            self._make_room(nbytes, whose.account)
            self._reserved[whose.account] += nbytes

    def release(self, nbytes: int, whose: Whose = NOBODYS) -> None:
        with self._lock:
            self._reserved[whose.account] -= nbytes
            self._reserved = +self._reserved  # without those that have none

    @contextmanager
    def promised(self, nbytes: int, whose: Whose = NOBODYS) -> Iterator[None]:
        """Room for something that is there until the block is left. Raises LimitError, BusyError."""
        self.reserve(nbytes, whose)
        try:
            yield
        finally:
            self.release(nbytes, whose)

    @property
    def held_bytes(self) -> int:
        with self._lock:
            self._expire()
            return self._held.total()

    @property
    def reserved_bytes(self) -> int:
        with self._lock:
            return self._reserved.total()

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._entries)

    def _find(self, key: str, who: str) -> _Entry[T]:
        self._expire()
        entry = self._entries.get(key)
        if entry is None or not entry.whose.may_use(who):
            raise self._unknown()
        return entry

    def check_removable(self, whose: Whose, who: str) -> None:
        """Raise what somebody is told who may not remove a value: nothing of it unless they may use it."""
        if not whose.may_use(who):
            raise self._unknown()
        if not whose.may_remove(who):
            raise AccessError(f"{who!r} may use this {self._what}, not remove it: its owner can")

    def _unknown(self) -> NotFoundError:
        return NotFoundError(f"no {self._what} with this id: never there, deleted or expired")

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key)
        entry.gone = True
        self._held[entry.whose.account] -= entry.nbytes
        self._held = +self._held  # without those that have none
        if entry.users:
            self._leaving[entry.whose.account] += entry.nbytes
        else:
            self._wipe(entry.value)

    def _expire(self) -> None:
        now = self._now()
        while self._endings and self._endings[0][0] <= now:
            until, key = heapq.heappop(self._endings)
            entry = self._entries.get(key)
            if entry is not None and entry.expires_at == until:
                self._remove(key)
        if len(self._endings) > 2 * len(self._entries) + 64:
            self._endings = [(entry.expires_at, key) for key, entry in self._entries.items()]
            heapq.heapify(self._endings)

    def _make_room(self, nbytes: int, account: Account) -> None:
        self._expire()
        self._shares.check(nbytes)
        taken = self._held + self._leaving + self._reserved
        if self._shares.fits(nbytes, account, taken):
            return
        now = self._now()
        movable = [
            Movable(key, entry.whose.account, entry.nbytes, entry.last_used)
            for key, entry in self._entries.items()
            if not entry.users and entry.fresh_until <= now
        ]
        for key in self._shares.make_room(nbytes, account, movable, taken, self._retry_after_s(now)):
            self._remove(key)

    def _retry_after_s(self, now: float) -> float:
        """Until the next value may go, within reason."""
        soonest = min((min(e.expires_at, e.fresh_until or now) for e in self._entries.values()), default=now)
        return min(max(soonest - now, _RETRY_S[0]), _RETRY_S[1])
