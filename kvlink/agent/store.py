"""What an agent holds: contexts under ids that cannot be guessed, with a lifetime and a memory bound.

Does not know: what is held, beyond its size. Place on the path: between a transfer and a question.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvlink.errors import LimitError, NotFoundError

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    nbytes: int
    expires_at: float
    last_used: float


class Store(Generic[T]):
    """Values by id. A use extends nothing but the order in which values make room.

    `max_bytes` bounds what is held and what is promised (`reserve`) together. To make room the
    least recently used values go first; what is larger than the bound is refused.
    """

    def __init__(
        self, what: str, max_bytes: int, lifetime_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self.max_bytes = max_bytes
        self.lifetime_s = lifetime_s
        self._now = now
        self._entries: dict[str, _Entry[T]] = {}
        self._reserved = 0
        self._lock = threading.Lock()

    def granted_s(self, asked_s: float) -> float:
        """The lifetime that a value gets: what was asked for, at most the store's; 0 asks for that."""
        return min(asked_s or self.lifetime_s, self.lifetime_s)

    def put(self, value: T, nbytes: int, lifetime_s: float = 0.0) -> str:
        """Hold a value; returns its id, 16 random bytes as text. Raises LimitError."""
        with self._lock:
            self._make_room(nbytes)
            key = secrets.token_urlsafe(16)
            now = self._now()
            self._entries[key] = _Entry(value, nbytes, now + self.granted_s(lifetime_s), now)
            return key

    def get(self, key: str) -> T:
        """The value of an id. Raises NotFoundError where it is unknown or has expired."""
        with self._lock:
            self._expire()
            entry = self._entries.get(key)
            if entry is None:
                raise NotFoundError(f"no {self._what} with this id: never there, deleted or expired")
            entry.last_used = self._now()
            return entry.value

    def delete(self, key: str) -> None:
        """Forget a value. Raises NotFoundError."""
        with self._lock:
            self._expire()
            if self._entries.pop(key, None) is None:
                raise NotFoundError(f"no {self._what} with this id: never there, deleted or expired")

    def sweep(self) -> None:
        """Forget what has expired, now rather than at the next call."""
        with self._lock:
            self._expire()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            self._expire()
            return key in self._entries

    def reserve(self, nbytes: int) -> None:
        """Promise room for something on its way; `release` gives it back. Raises LimitError."""
        with self._lock:
            self._make_room(nbytes)
            self._reserved += nbytes

    def release(self, nbytes: int) -> None:
        with self._lock:
            self._reserved -= nbytes

    @property
    def held_bytes(self) -> int:
        with self._lock:
            self._expire()
            return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._entries)

    def _expire(self) -> None:
        now = self._now()
        for key in [key for key, entry in self._entries.items() if entry.expires_at <= now]:
            del self._entries[key]

    def _make_room(self, nbytes: int) -> None:
        self._expire()
        free = self.max_bytes - self._reserved - sum(e.nbytes for e in self._entries.values())
        if nbytes > self.max_bytes - self._reserved:
            raise LimitError(
                f"{nbytes} bytes for a {self._what}: at most {self.max_bytes} are held, {self._reserved} promised"
            )
        for key in sorted(self._entries, key=lambda k: self._entries[k].last_used):
            if free >= nbytes:
                return
            free += self._entries.pop(key).nbytes
