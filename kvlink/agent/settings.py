"""Bounds and addresses of the two agents, as their operators set them.

Does not know: how a bound is kept. Place on the path: beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvlink.agent.sender import DEFAULT_RECIPE
from kvlink.transport.address import check_pattern
from kvlink.transport.credentials import Credentials
from kvlink.wire.session import Limits


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """Bounds of a receiver agent. Lifetimes in seconds; 0 for one peer means as for all.

    `transfer_deadline_s`: from a transfer's first frame to its end, whatever breaks in between.
    `idle_s`: a stream that brings no frame for so long is ended. `unused_s`: a cache that nobody has
    asked yet is not made room of so soon. `durable_bytes`: frames are made durable, and the sender is
    told so, whenever that many have come.
    """

    max_held_bytes: int = 8_000_000_000
    max_peer_bytes: int = 0
    cache_lifetime_s: float = 3600.0
    unused_s: float = 30.0
    resume_lifetime_s: float = 120.0
    transfer_deadline_s: float = 900.0
    idle_s: float = 300.0
    durable_bytes: int = 1_000_000
    max_transfers: int = 32
    max_peer_transfers: int = 0
    max_generations: int = 8
    max_waiting: int = 64
    wait_s: float = 10.0
    max_new_tokens: int = 1024
    staging: Path | None = None
    max_staged_bytes: int = 16_000_000_000
    limits: Limits = field(default_factory=Limits)


LOOPBACK_PEERS = ("127.0.0.1:*", "localhost:*", "[::1]:*")


@dataclass(frozen=True, slots=True)
class SenderSettings:
    """Bounds of a sender agent. Lifetimes in seconds; 0 bytes for one peer means as for all.

    `peers`: receivers that may be dialled, as host:port with `*` for any letters; empty: those that the credentials
    list, or loopback where there are none. `insecure`: dial off loopback without encryption.
    `presses`: whether a caller's recipe may name a class of kvpress, which imports that package.
    `attempts`: dials in a row that bring nothing before a delivery is broken.
    """

    max_held_bytes: int = 8_000_000_000
    max_peer_bytes: int = 0
    context_lifetime_s: float = 3600.0
    resume_lifetime_s: float = 120.0
    max_text_bytes: int = 16_000_000
    max_reads: int = 8
    max_waiting: int = 64
    wait_s: float = 10.0
    peers: tuple[str, ...] = ()
    insecure: bool = False
    credentials: Credentials | None = None
    default_recipe: str = DEFAULT_RECIPE
    presses: bool = False
    attempts: int = 4
    retry_pause_s: float = 0.5
    staging: Path | None = None
    max_packed_bytes: int = 2_000_000_000
    max_staged_bytes: int = 16_000_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "peers", tuple(map(check_pattern, self.peers)))
