"""Profiles that senders have sent ahead: a few, shared among the peers that sent them.

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

from kvlink.agent.shares import Account, Movable, Shares
from kvlink.errors import BusyError
from kvlink.profile import Profile

MAX_PROFILES = 8
"""Of all peers; half of them of one."""
UNUSED_S = 3600.0
"""Seconds after which a profile that nobody has named goes for anybody's."""
_RETRY_S = 5.0


class Profiles(Mapping[str, Profile]):
    """Profiles by their digest in hex; for several threads. A look-up is a use."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._shares = Shares("profile", MAX_PROFILES)
        self._now = now
        self._held: dict[str, Profile] = {}
        self._holders: dict[str, Account] = {}
        """Who holds what, by peer and digest."""
        self._used_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, profile: Profile, peer: str = "") -> None:
        """Hold a profile for a peer. Raises BusyError where others have a right to every place."""
        digest = profile.digest.hex()
        mine, account = _place(peer, digest), Account(peer)
        with self._lock:
            oldest = self._now() - UNUSED_S
            for place in [place for place in self._holders if self._used_at[_digest(place)] < oldest]:
                self._leave(place)
            if mine not in self._holders:
                movable = [
                    Movable(place, whose, 1, self._used_at[_digest(place)])
                    for place, whose in self._holders.items()
                ]
                going = self._shares.make_room(1, account, movable, Counter(self._holders.values()))
                if going is None:
                    raise BusyError(
                        f"at most {MAX_PROFILES} profiles are held, {self._shares.max_peer_bytes} for one peer; "
                        "try again later", _RETRY_S,
                    )  # fmt: skip
                for place in going:
                    self._leave(place)
                self._holders[mine] = account
            self._held[digest], self._used_at[digest] = profile, self._now()

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
        del self._holders[place]
        digest = _digest(place)
        if not any(_digest(other) == digest for other in self._holders):
            del self._held[digest], self._used_at[digest]


def _place(peer: str, digest: str) -> str:
    return f"{digest}/{peer}"


def _digest(place: str) -> str:
    return place.partition("/")[0]
