"""What the two services do, in the package's own values: the handlers that agents implement.

Does not know: gRPC, protobuf. Place on the path: between the agents and the transport.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvlink.receipt import Capabilities, Receipt
from kvlink.recipe import Target

PushState = Literal["accepted", "durable", "complete", "enough", "failed", "cancelled"]
TERMINAL: tuple[PushState, ...] = ("complete", "enough", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `name`: proven by a certificate, empty where the agent asks for none.

    `readers`: peers that may use what this call leaves behind; `asked_by`: the one that asked for it, and
    may remove it. `remaining_s`: until the caller's deadline, None where there is none. `trace`: W3C
    traceparent of the caller's span. `host`: where the connection comes from.
    """

    name: str = ""
    readers: tuple[str, ...] = ()
    remaining_s: float | None = None
    trace: str = ""
    asked_by: str = ""
    host: str = ""

    @property
    def account(self) -> str:
        """Against whose share the call counts: nobody's name is the connection's host."""
        return self.name or self.host


NOBODY = Caller()


@dataclass(frozen=True, slots=True)
class PushStatus:
    """The receiver's word on a transfer; `next_sequence` is the frame it wants next."""

    state: PushState
    next_sequence: int
    cache_id: str = ""
    receipt: Receipt = field(default_factory=Receipt)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """A context that a sender holds. `context_id` is the last part of its handle."""

    context_id: str
    context_tokens: int
    cache_bytes: int
    prefill_s: float
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """What to deliver: a published context or a text to read now, reduced for a question.

    `delivery_id`: 16 bytes that name it, so that it can be resumed and cancelled. `base_digest`: the
    `cache_digest` of an earlier delivery to the same receiver: only what is missing there travels.
    """

    receiver: str
    question: str
    recipe: str = ""
    context_id: str = ""
    text: str = ""
    answer_here: bool = False
    explain: bool = False
    target: Target = field(default_factory=Target)
    delivery_id: bytes = b""
    base_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Fetch:
    """What to fetch: a published context, reduced for a question. `transfer_id`: 16 bytes or empty;
    with the id of a fetch that broke it goes on at `next_sequence` (a client does so by itself)."""

    context_id: str
    question: str = ""
    recipe: str = ""
    target: Target = field(default_factory=Target)
    transfer_id: bytes = b""
    next_sequence: int = 0
    base_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a delivery chose, a figure for each token of the context in its prompt.

    `tokens`: as text. `need`: share of the votes of question and draft, sum 1. `kept`: share of
    layers and heads that keep it, 0 where it was not sent.
    """

    tokens: tuple[str, ...] = ()
    need: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a delivery is; the last one has `done`."""

    sent_bytes: int
    total_bytes: int
    done: bool = False
    cache_id: str = ""
    sender_answer: str = ""
    receipt: Receipt = field(default_factory=Receipt)
    explanation: Explanation = field(default_factory=Explanation)


@dataclass(frozen=True, slots=True)
class Ask:
    """A question for a held context, or for one that a sender holds.

    `handle`: instead of `cache_id`; the receiver pulls it, by `recipe` and `target`.
    """

    cache_id: str
    question: str
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    handle: str = ""
    recipe: str = ""
    target: Target = field(default_factory=Target)


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer; the last one has `done`, the receipt and the id of the cache."""

    text: str
    token_ids: tuple[int, ...] = ()
    done: bool = False
    receipt: Receipt = field(default_factory=Receipt)
    cache_id: str = ""


class FrameSource(Protocol):
    """The frames of a transfer by their numbers; later ones may still have to be made."""

    @property
    def count(self) -> int | None:
        """How many there are, None where it is not known yet."""

    async def frame(self, number: int) -> bytes | None:
        """Frame `number`, as soon as it is there; None behind the last one."""


class ReceiverHandler(Protocol):
    """What a receiver agent does for its callers."""

    def capabilities(self) -> Capabilities: ...
    def push_cache(self, frames: AsyncIterator[bytes], caller: Caller) -> AsyncIterator[PushStatus]: ...
    async def transfer_status(self, transfer_id: bytes, caller: Caller) -> PushStatus: ...
    async def cancel_transfer(self, transfer_id: bytes, caller: Caller) -> None: ...
    def generate(self, ask: Ask, caller: Caller) -> AsyncIterator[Piece]: ...
    def delete_cache(self, cache_id: str, caller: Caller) -> None: ...
    async def put_profile(
        self, digest: bytes, total_bytes: int, pieces: AsyncIterator[bytes], caller: Caller
    ) -> None: ...


class SenderHandler(Protocol):
    """What a sender agent does for its callers."""

    def capabilities(self) -> Capabilities: ...
    async def publish(
        self, text: str, lifetime_s: int, turns: list[tuple[str, str]], caller: Caller, extends: str
    ) -> Published: ...
    def unpublish(self, context_id: str, caller: Caller) -> None: ...
    def fetch_cache(self, fetch: Fetch, caller: Caller) -> AsyncIterator[bytes]: ...
    def deliver_cache(self, delivery: Delivery, caller: Caller) -> AsyncIterator[Progress]: ...
    async def cancel_delivery(self, delivery_id: bytes, caller: Caller) -> None: ...
