"""Shares of memory: whose values make room for whose.

Memory that nobody else wants is anybody's, up to a bound for one peer. When it is full it is shared evenly
among the peers that hold some, and the part of one peer among those for whom it holds something: a
newcomer that stays within its share takes the room from those beyond theirs; beyond its own share it takes
it from itself only. So no peer loses a value to somebody who has more.

Does not know: what is held, how long. Place on the path: under the stores of both agents.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvlink.errors import BusyError, LimitError
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

    def fits(self, nbytes: int, mine: Account, taken: Mapping[Account, int]) -> bool:
        """Whether there is room for `nbytes` more of an account as it is. `taken`: bytes by account."""
        own = sum(count for account, count in taken.items() if account.peer == mine.peer)
        return own + nbytes <= self.max_peer_bytes and sum(taken.values()) + nbytes <= self.max_bytes

    def make_room(
        self,
        nbytes: int,
        mine: Account,
        movable: Iterable[Movable],
        taken: Mapping[Account, int],
        retry_after_s: float = 2.0,
    ) -> list[str]:
        """Keys of what goes for `nbytes` more of an account.

        `taken`: bytes by account of everything, movable or not. Raises LimitError, and BusyError
        (`retry_after_s`: when it may be worth another try) where what may go is not enough.
        """
        self.check(nbytes)
        left: dict[Account, deque[Movable]] = {}
        for item in sorted(movable, key=lambda item: item.used_at):
            left.setdefault(item.account, deque()).append(item)
        used = Counter(dict(taken))
        going: list[str] = []
        while not self.fits(nbytes, mine, used):
            yielding = self._yielding(mine, nbytes, used)
            able = [queue for account, queue in left.items() if account in yielding]
            if not able:
                raise BusyError(
                    f"{nbytes} bytes for a {self._what}: at most {self.max_bytes} are held here, "
                    f"{self.max_peer_bytes} for one peer, and {sum(taken.values())} are taken; try again later",
                    retry_after_s,
                )
            queue = min(able, key=lambda queue: (queue[0].account == mine, queue[0].used_at))
            victim = queue.popleft()
            if not queue:
                del left[victim.account]
            used[victim.account] -= victim.nbytes
            going.append(victim.key)
        return going

    def _yielding(self, mine: Account, nbytes: int, used: Counter[Account]) -> set[Account]:
        """Whose values go for a newcomer: its own, and those beyond their share while the newcomer is within."""
        peers, parts = Counter({mine.peer: 0}), Counter({mine.asker: 0})
        for account, count in used.items():
            peers[account.peer] += count
            if account.peer == mine.peer:
                parts[account.asker] += count
        askers = _beyond(parts, mine.asker, nbytes, self.max_peer_bytes)
        own_full = peers[mine.peer] + nbytes > self.max_peer_bytes
        others = set() if own_full else _beyond(peers, mine.peer, nbytes, self.max_bytes)
        return {
            account
            for account in used
            if account == mine
            or (account.asker in askers if account.peer == mine.peer else account.peer in others)
        }


def _beyond(parts: Counter[str], mine: str, nbytes: int, whole: int) -> set[str]:
    """Who has more than an even share of `whole`, where `mine` with `nbytes` more has no more than it."""
    share = whole // sum(1 for who, count in parts.items() if count or who == mine)
    return {who for who, count in parts.items() if count > share} if parts[mine] + nbytes <= share else set()
