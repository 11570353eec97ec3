"""Bounds and addresses of the two agents, as their operators set them.

Each field is an option of the command that runs the agent: what it is for, its least value and its default
stand here and nowhere else. An option is named as its field, less `_bytes`, unless the field says otherwise.

Does not know: how a bound is kept, how an option is read. Place on the path: beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from kvlink.bounds import TEXT
from kvlink.errors import AccessError
from kvlink.recipe import DEFAULT_RECIPE
from kvlink.transport.address import Address, check_advertised, check_pattern
from kvlink.wire.lifecycle import Waits
from kvlink.wire.session import Limits


class Listed(Protocol):
    """Whom an agent's credentials name as peers that it dials."""

    def addresses(self) -> list[str]: ...


LOOPBACK_PEERS = ("127.0.0.1:*", "localhost:*", "[::1]:*")

_LIMITS = Limits()
_MEMORY_BYTES, _DISK_BYTES = 8_000_000_000, 16_000_000_000
_LIFETIME_S, _RESUME_S = 3600.0, 120.0
_WAITING, _WAIT_S = 64, 10.0
_STOP_S = 8.0
"""Inside of the 10 s after which a container runtime kills."""
_STOP_HELP = "Seconds from SIGTERM to the end of the process, whatever is at work."
_ADVERTISE_HELP = "host:port that others reach this agent by, where that is not what it listens on."


@dataclass(frozen=True, slots=True)
class About:
    """What the field of a setting says of itself beside its default. `least`: the smallest value; bytes,
    counts, seconds. `option`: its name on the command line where that is not the field's."""

    help: str
    least: float = 0
    option: str = ""


def setting(default: Any, help: str, *, least: float = 0, option: str = "") -> Any:
    """The field of a setting, which is an option too."""
    return field(default=default, metadata={"about": About(help, least, option)})


def allowed(text: str, peers: tuple[str, ...], credentials: Listed | None) -> str:
    """An address in its one spelling, if this agent may dial it: one of `peers`, where there are none those that
    the credentials list, or loopback without any. Raises ConfigError, AccessError."""
    address = Address.parse(text)
    listed = credentials.addresses() if credentials else LOOPBACK_PEERS
    found = peers or tuple(listed)
    if not any(map(address.matches, found)):
        raise AccessError(
            f"{text!r} is not in this agent's peer list ({', '.join(found)}); add it with --peer"
        )
    return str(address)


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """Bounds of a receiver agent. Lifetimes in seconds; 0 for one peer means half of what is for all.

    `peers`, `credentials`: as of a sender, for the handles that it redeems.
    """

    max_held_bytes: int = setting(_MEMORY_BYTES, "Memory for held caches.", least=1)
    max_peer_bytes: int = setting(0, "Of it for one peer; 0: half.", option="max-peer-held")
    max_cache_bytes: int = setting(_LIMITS.max_cache_bytes, "Memory of one cache.", least=1)
    max_context_tokens: int = setting(_LIMITS.max_context_tokens, "Tokens of one context.", least=1)
    max_frame_bytes: int = setting(_LIMITS.max_frame_bytes, "Bytes of one frame.", least=1)
    max_frames: int = setting(_LIMITS.max_frames, "Frames of one transfer.", least=1)
    max_segments: int = setting(_LIMITS.max_segments, "Segments of one transfer.", least=1)
    max_text_bytes: int = setting(
        _LIMITS.max_text_bytes, "Bytes of a text that comes in place of a cache.", least=1
    )
    cache_lifetime_s: float = setting(_LIFETIME_S, "Seconds that a cache is held.", least=0.1)
    unused_s: float = setting(30.0, "Seconds in which a cache that nobody has asked yet is not made room of.")
    resume_lifetime_s: float = setting(_RESUME_S, "Seconds to resume a broken transfer in.")
    transfer_deadline_s: float = setting(
        900.0, "Seconds from a transfer's first frame to its end.", least=0.1
    )
    start_s: float = setting(
        5.0,
        "Seconds after which a transfer that brings nothing after its manifest loses its place.",
        least=0.1,
    )
    idle_s: float = setting(300.0, "Seconds after which a stream that brings no frame is ended.", least=0.1)
    durable_bytes: int = setting(
        1_000_000, "Bytes after which frames are made durable, and the sender is told so.", least=1,
        option="durable-every",
    )  # fmt: skip
    max_transfers: int = setting(32, "Transfers at a time.", least=1)
    max_peer_transfers: int = setting(0, "Of them by one peer; 0: half.")
    max_generations: int = setting(8, "Generations at a time.", least=1)
    max_peer_generations: int = setting(0, "Of them for one peer; 0: half.")
    max_waiting: int = setting(_WAITING, "Callers that may wait for a place.")
    wait_s: float = setting(_WAIT_S, "Seconds that they wait at most.")
    max_new_tokens: int = setting(1024, "Tokens of one answer.", least=1)
    max_profiles_bytes: int = setting(
        2_000_000_000, "Memory for profiles that senders send ahead, 6 for each byte of a file.", least=1
    )
    max_peer_profiles_bytes: int = setting(0, "Of it for one peer; 0: half.")
    stop_s: float = setting(_STOP_S, _STOP_HELP, least=1)
    staging: Path | None = setting(None, "Folder where transfers outlive a restart of the agent.")
    max_staged_bytes: int = setting(_DISK_BYTES, "Bytes of that folder.", least=1)
    max_peer_staged_bytes: int = setting(0, "Of it for one peer; 0: half.")

    peers: tuple[str, ...] = setting(
        (), "Sender whose handles are redeemed, as host:port with * for any letters; repeat.", option="peer"
    )
    credentials: Listed | None = None
    default_recipe: str = setting(DEFAULT_RECIPE, "Recipe of a handle's transfer, of whoever names none.")
    advertised_address: str = setting("", _ADVERTISE_HELP, option="advertise")

    def __post_init__(self) -> None:
        object.__setattr__(self, "peers", tuple(map(check_pattern, self.peers)))
        object.__setattr__(self, "advertised_address", check_advertised(self.advertised_address))

    @property
    def limits(self) -> Limits:
        """What of these a session of the wire keeps."""
        return Limits(**{f.name: getattr(self, f.name) for f in fields(Limits)})

    @property
    def waits(self) -> Waits:
        """What of these decides in the life of a transfer."""
        return Waits(self.start_s, self.idle_s, self.resume_lifetime_s, self.transfer_deadline_s)


@dataclass(frozen=True, slots=True)
class SenderSettings:
    """Bounds of a sender agent. Lifetimes in seconds; 0 for one peer means half of what is for all.

    `peers`: empty: those that the credentials list, or loopback where there are none.
    `credentials`: whose list that is.
    """

    max_held_bytes: int = setting(_MEMORY_BYTES, "Memory for published contexts.", least=1)
    max_peer_bytes: int = setting(0, "Of it for one peer; 0: half.", option="max-peer-held")
    context_lifetime_s: float = setting(_LIFETIME_S, "Seconds that a context is held.", least=0.1)
    resume_lifetime_s: float = setting(_RESUME_S, "Seconds to resume a broken delivery in.")
    max_text_bytes: int = setting(TEXT.most, "Bytes of a text to read.", least=1)
    max_reads: int = setting(2, "Contexts read or packed at a time.", least=1)
    max_peer_reads: int = setting(0, "Of them for one peer; 0: half.")
    max_waiting: int = setting(_WAITING, "Callers that may wait for a place.")
    wait_s: float = setting(_WAIT_S, "Seconds that they wait at most.")
    stop_s: float = setting(_STOP_S, _STOP_HELP, least=1)
    peers: tuple[str, ...] = setting(
        (), "Receiver that may be dialled, as host:port with * for any letters; repeat.", option="peer"
    )
    credentials: Listed | None = None
    default_recipe: str = setting(DEFAULT_RECIPE, "Recipe of whoever names none.")
    presses: bool = setting(
        False, "Let a caller's recipe name a class of kvpress, which imports it.", option="press"
    )
    attempts: int = setting(4, "Dials in a row that bring nothing before a delivery is broken.", least=1)
    retry_pause_s: float = setting(0.5, "Seconds before the second dial; later ones wait longer.")
    staging: Path | None = setting(None, "Folder where deliveries outlive a restart of the agent.")
    max_packed_bytes: int = setting(4_000_000_000, "Memory for packed transfers on their way.", least=1)
    max_peer_packed_bytes: int = setting(0, "Of it for one peer; 0: half.")
    max_staged_bytes: int = setting(_DISK_BYTES, "Bytes of the staging folder.", least=1)
    max_peer_staged_bytes: int = setting(0, "Of it for one peer; 0: half.")
    advertised_address: str = setting("", _ADVERTISE_HELP, option="advertise")

    def __post_init__(self) -> None:
        object.__setattr__(self, "advertised_address", check_advertised(self.advertised_address))
        object.__setattr__(self, "peers", tuple(map(check_pattern, self.peers)))
