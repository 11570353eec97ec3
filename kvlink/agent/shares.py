"""Shares of memory: whose values make room for whose.

Memory that nobody else wants is anybody's, up to a bound for one peer. When it is full it is shared evenly
among the peers that hold some, and the part of one peer among those for whom it holds something: a
newcomer that stays within its share takes the room from those beyond theirs; beyond its own share it takes
it from itself only. So no peer loses a value to somebody who has more.

Does not know: what is held, how long. Place on the path: under the stores of both agents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvlink.errors import LimitError
from kvlink.transport.api import Caller


@dataclass(frozen=True, slots=True)
class Account:
    """Against whose share something counts: the peer that brought it, and for whom it did so."""

    peer: str = ""
    asker: str = ""


@dataclass(frozen=True, slots=True)
class Whose:
    """To whom a value belongs. Its owner, and who asked for its delivery, may remove it; readers may use it."""

    owner: str = ""
    readers: frozenset[str] = frozenset()
    asker: str = ""
    peer: str = ""

    @classmethod
    def left_by(cls, caller: Caller) -> Whose:
        """Of what a call leaves behind."""
        return cls(caller.name, frozenset(caller.readers), caller.asked_by, caller.account)

    @property
    def account(self) -> Account:
        return Account(self.peer or self.owner, self.asker)

    def may_use(self, who: str) -> bool:
        return self.may_remove(who) or who in self.readers

    def may_remove(self, who: str) -> bool:
        return who == self.owner or (bool(self.asker) and who == self.asker)


@dataclass(frozen=True, slots=True)
class Movable:
    """Something held that could make room. `used_at`: when it was last used, on any clock."""

    key: str
    account: Account
    nbytes: int
    used_at: float


def half(whole: int) -> int:
    """The share of one peer where nothing else was set: half, and at least one."""
    return max(1, (whole + 1) // 2)


class Shares:
    """`max_bytes` in all, `max_peer_bytes` for one peer (0: half)."""

    def __init__(self, what: str, max_bytes: int, max_peer_bytes: int = 0) -> None:
        self._what = what
        self.max_bytes = max_bytes
        self.max_peer_bytes = min(max_peer_bytes or half(max_bytes), max_bytes)

    def check(self, nbytes: int) -> None:
        """Raise LimitError where a value could never be held."""
        for most, whose in ((self.max_bytes, ""), (self.max_peer_bytes, " for one peer")):
            if nbytes > most:
                raise LimitError(f"{nbytes} bytes for a {self._what}: at most {most} are held{whose} here")

    def make_room(
        self, nbytes: int, mine: Account, movable: Iterable[Movable], taken: Mapping[Account, int]
    ) -> list[str] | None:
        """Keys of what goes for `nbytes` more of an account; None where that is not enough.

        `taken`: bytes by account of everything, movable or not. Raises LimitError.
        """
        self.check(nbytes)
        left, used = list(movable), Counter(dict(taken))
        going: list[str] = []
        while True:
            own = sum(count for account, count in used.items() if account.peer == mine.peer)
            full, own_full = used.total() + nbytes > self.max_bytes, own + nbytes > self.max_peer_bytes
            if not full and not own_full:
                return going
            able = [
                item
                for item in left
                if (item.account.peer == mine.peer or not own_full) and self._yields(item, mine, nbytes, used)
            ]
            if not able:
                return None
            victim = min(able, key=lambda item: (item.account == mine, item.used_at))
            left.remove(victim)
            used[victim.account] -= victim.nbytes
            going.append(victim.key)

    def _yields(self, item: Movable, mine: Account, nbytes: int, used: Counter[Account]) -> bool:
        """Whether a value goes for a newcomer: its own, or one beyond its share while the newcomer is within."""
        theirs = item.account
        if theirs == mine:
            return True
        if theirs.peer == mine.peer:
            parts = {mine.asker: 0}
            for account, count in used.items():
                if account.peer == mine.peer:
                    parts[account.asker] = parts.get(account.asker, 0) + count
            return _beyond(parts, theirs.asker, mine.asker, nbytes, self.max_peer_bytes)
        peers = {mine.peer: 0}
        for account, count in used.items():
            peers[account.peer] = peers.get(account.peer, 0) + count
        return _beyond(peers, theirs.peer, mine.peer, nbytes, self.max_bytes)


def _beyond(parts: dict[str, int], theirs: str, mine: str, nbytes: int, whole: int) -> bool:
    share = whole // sum(1 for who, count in parts.items() if count or who == mine)
    return parts[mine] + nbytes <= share < parts.get(theirs, 0)
