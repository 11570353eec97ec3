"""A context that a sender has read, and what it knows of it: ids, cache, evidence, what receivers hold.

Does not know: how it was read, recipes, sockets. Place on the path: between prefill and select.
"""

from __future__ import annotations

import struct
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from kvlink.agent.plan import Delivered
from kvlink.cache import Evidence, KVCache
from kvlink.model.generate import Answer
from kvlink.payload import Prompt
from kvlink.selection import Selection

_DELIVERED = 32
"""Transfers of a context that later ones can add to."""
_DELIVERED_BYTES = 1_000_000
"""Of what is noted about them, or an eighth of the context's cache where that is more."""
_ID_BYTES = 36
"""Of a token's id in a list."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A text in tokens, with what stands around it. `cache_bytes`: what reading it will take."""

    text: str
    prompt: Prompt
    ids: list[int]
    cache_bytes: int


@dataclass(slots=True)
class Context:
    """A context that was read: its text, token ids and full cache.

    `evidence` remembers what the context alone gives (snapkv, h2o, a press), by `evidence_key`.
    """

    text: str
    ids: list[int]
    prompt: Prompt
    cache: KVCache
    prefill_s: float
    evidence: dict[tuple[Any, ...], Evidence] = field(default_factory=dict)
    delivered: dict[bytes, Delivered] = field(default_factory=dict)
    """What transfers of this context, or of one that it extends, leave at a receiver, by its digest."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def digest(self) -> bytes:
        """16 bytes that name the context: BLAKE3 of the token ids as little-endian uint32."""
        return blake3(struct.pack(f"<{len(self.ids)}I", *self.ids)).digest(length=16)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + sys.getsizeof(self.text) + _ID_BYTES * len(self.ids)

    def wipe(self) -> None:
        """Zero the cache and forget the text; nobody may be using it."""
        self.cache.wipe()
        self.text, self.ids = "", []
        self.evidence.clear()
        self.delivered.clear()

    def remember(self, left: Delivered) -> None:
        """Note what a transfer leaves at a receiver; the latest ones are kept."""
        with self.lock:
            self.delivered[left.digest] = left
            most = max(_DELIVERED_BYTES, self.cache.nbytes // 8)
            while len(self.delivered) > _DELIVERED or sum(x.nbytes for x in self.delivered.values()) > most:
                del self.delivered[next(iter(self.delivered))]


@dataclass(frozen=True, slots=True)
class Look:
    """What the sender saw for one question before it chose: the evidence, the draft if one was
    made, and the seconds that it took by stage."""

    evidence: Evidence = field(default_factory=Evidence)
    draft: Answer | None = None
    stage_s: dict[str, float] = field(default_factory=dict)


def evidence_key(selection: Selection) -> tuple[Any, ...]:
    """What captured evidence depends on: method and window; a press may look at the amount too."""
    amount = (selection.amount,) if selection.press else ()
    return (selection.name, selection.window, *amount)
