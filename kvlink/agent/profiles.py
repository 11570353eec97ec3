"""Profiles that senders have sent ahead: so many bytes of memory, shared among the peers that sent them.

Room for a profile is promised before its first byte is taken, and free again where it does not come whole.
Each peer holds what it has sent, also where another has sent the same before: what one peer lets go stays
while another holds it. What nobody has named for long goes first.

Does not know: what a profile says. Place on the path: beside a receiver's intakes, which look up what
their manifests name.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kvlink.agent.shares import Account, Movable, Shares
from kvlink.errors import LimitError
from kvlink.profile import MAX_BYTES as MAX_FILE_BYTES
from kvlink.profile import MEMORY_PER_BYTE, Profile

MAX_BYTES = 2_000_000_000
UNUSED_S = 3600.0
"""Seconds after which a profile that nobody has named goes for anybody's."""
MOST = 32
"""Profiles at a time: each counts for at least its part of the memory."""
_RETRY_S = 5.0


class Profiles(Mapping[str, Profile]):
    """Profiles by their digest in hex; for several threads. A look-up is a use.

    `max_bytes`: memory of all, `max_peer_bytes` of those of one peer (0: half), `MEMORY_PER_BYTE` for each
    byte of a file.
    """

    def __init__(
        self, max_bytes: int = MAX_BYTES, max_peer_bytes: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._shares = Shares("profile", max_bytes, max_peer_bytes)
        self._now = now
        self._held: dict[str, Profile] = {}
        self._places: dict[str, tuple[Account, int]] = {}
        """Who holds what, by digest and peer: against whose share, and the bytes that it counts for."""
        self._used_at: dict[str, float] = {}
        self._promised: Counter[Account] = Counter()
        self._lock = threading.Lock()

    def bound(self, max_bytes: int, max_peer_bytes: int) -> None:
        """Other bounds, for what comes from now on."""
        self._shares = Shares("profile", max_bytes, max_peer_bytes)

    @property
    def max_file_bytes(self) -> int:
        """The largest file that one peer may send."""
        return min(self._shares.max_peer_bytes // MEMORY_PER_BYTE, MAX_FILE_BYTES)

    @property
    def promised_bytes(self) -> int:
        """Memory promised to profiles on their way."""
        return self._promised.total()

    @contextmanager
    def room(self, file_bytes: int, peer: str = "") -> Iterator[Callable[[Profile], None]]:
        """Room for the profile of a file, until the block is left; what is given keeps it for `peer`.

        Raises LimitError where so large a one is never held, BusyError where others have a right to the room.
        """
        if file_bytes > self.max_file_bytes:
            raise LimitError(f"a profile of {file_bytes} bytes: at most {self.max_file_bytes} are taken here")
        account = Account(peer)
        nbytes = max(MEMORY_PER_BYTE * file_bytes, self._shares.max_bytes // MOST)
        with self._lock:
            self._make_room(nbytes, account)
            self._promised[account] += nbytes
        promised = [nbytes]

        def keep(profile: Profile) -> None:
            digest = profile.digest.hex()
            with self._lock:
                self._promised[account] -= promised.pop()
                self._places[_place(peer, digest)] = account, nbytes
                self._held[digest], self._used_at[digest] = profile, self._now()

        try:
            yield keep
        finally:
            with self._lock:
                self._promised[account] -= sum(promised)
                self._promised = +self._promised  # without those that have none

    def _make_room(self, nbytes: int, account: Account) -> None:
        oldest = self._now() - UNUSED_S
        for place in [place for place in self._places if self._used_at[_digest(place)] < oldest]:
            self._leave(place)
        taken = Counter(self._promised)
        for whose, size in self._places.values():
            taken[whose] += size
        movable = [
            Movable(place, whose, size, self._used_at[_digest(place)])
            for place, (whose, size) in self._places.items()
        ]
        for place in self._shares.make_room(nbytes, account, movable, taken, _RETRY_S):
            self._leave(place)

    def __getitem__(self, digest: str) -> Profile:
        with self._lock:
            found = self._held[digest]
            self._used_at[digest] = self._now()
            return found

    def __contains__(self, digest: object) -> bool:
        return digest in self._held

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)

    def _leave(self, place: str) -> None:
        del self._places[place]
        digest = _digest(place)
        if not any(_digest(other) == digest for other in self._places):
            del self._held[digest], self._used_at[digest]


def _place(peer: str, digest: str) -> str:
    return f"{digest}/{peer}"


def _digest(place: str) -> str:
    return place.partition("/")[0]
