"""The receiver agent as a service: transfers in, caches held, questions answered.

A transfer whose stream breaks is kept for a while; a new stream with the same manifest goes on at
the frame that is missing. A second stream for a live transfer takes it over: the first one's
connection is taken for dead.

Does not know: gRPC. Place on the path: the receiver's edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvlink._release import RELEASE
from kvlink.agent.receiver import Held, Intake, Receiver
from kvlink.agent.store import Store
from kvlink.agent.threads import stream
from kvlink.errors import (
    ContextError,
    KvlinkError,
    LimitError,
    NotFoundError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.generate import DEFAULT_NEW_TOKENS, Step
from kvlink.receipt import Capabilities, Receipt
from kvlink.transport.api import Ask, Piece, PushStatus
from kvlink.wire.session import Limits

log = logging.getLogger("kvlink.receiver")


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """Bounds of a receiver agent. Lifetimes in seconds."""

    max_held_bytes: int = 8_000_000_000
    cache_lifetime_s: float = 3600.0
    resume_lifetime_s: float = 120.0
    max_transfers: int = 32
    max_new_tokens: int = 1024
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class _Staged:
    """A transfer on its way in. `owner` is the stream that may feed it, one frame at a time."""

    intake: Intake
    manifest_frame: bytes
    reserved_bytes: int
    owner: object
    touched_at: float
    cache_id: str = ""
    receipt: Receipt = field(default_factory=Receipt)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ReceiverService:
    """Handles the calls of `ReceiverService` in the proto."""

    def __init__(self, receiver: Receiver, settings: ReceiverSettings | None = None) -> None:
        self._receiver = receiver
        self.settings = settings or ReceiverSettings()
        self.store: Store[Held] = Store("cache", self.settings.max_held_bytes, self.settings.cache_lifetime_s)
        self._staged: dict[bytes, _Staged] = {}
        self._prefill_tokens_per_s = 0.0

    def capabilities(self) -> Capabilities:
        lm, limits = self._receiver.lm, self.settings.limits
        return Capabilities(
            model_name=lm.name,
            fingerprint=lm.fingerprint,
            dtype=lm.dtype,
            release=RELEASE,
            limits={
                "max_cache_bytes": limits.max_cache_bytes,
                "max_context_tokens": min(limits.max_context_tokens, lm.window),
                "max_frame_bytes": limits.max_frame_bytes,
                "max_segments": limits.max_segments,
                "max_text_bytes": limits.max_text_bytes,
                "max_new_tokens": self.settings.max_new_tokens,
            },
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            profiles=tuple(bytes.fromhex(digest) for digest in self._receiver.known_profiles()),
        )

    async def put_profile(self, data: bytes) -> bytes:
        """Take a profile that a sender sends ahead of its transfers."""
        return (await asyncio.to_thread(self._receiver.add_profile, data)).digest

    async def push_cache(self, frames: AsyncIterator[bytes]) -> AsyncIterator[PushStatus]:
        """Take a transfer: accepted, durable after each segment, complete. See the proto."""
        me = object()
        staged = self._admit(await _first(frames), me)
        intake = staged.intake
        async with staged.lock:  # what an earlier stream brought last is counted
            status = self._status(staged, "complete" if staged.cache_id else "accepted")
        yield status
        if status.state == "complete":
            return
        try:
            async for frame in frames:
                async with staged.lock:
                    if staged.owner is not me:
                        raise RemoteProtocolError("another stream has taken this transfer over")
                    usable = intake.usable
                    await _finish(asyncio.to_thread(intake.take, frame))
                staged.touched_at = time.monotonic()
                if intake.usable and not usable:
                    yield self._status(staged, "durable")
                if intake.held is not None:
                    self._keep(staged, intake.held)
                    yield self._status(staged, "complete")
                    return
            raise TruncatedError(
                f"the stream ended before frame {intake.session.next_sequence}; "
                "the same transfer id and manifest resume it there"
            )
        except (TruncatedError, asyncio.CancelledError):
            log.info("transfer %s: cut at frame %d", _id(staged), intake.session.next_sequence)
            raise
        except KvlinkError:
            if staged.owner is me:
                self._drop(staged)
            raise

    def _admit(self, frame: bytes, me: object) -> _Staged:
        """Open a transfer, or find the one that this manifest resumes."""
        self.sweep()
        intake = Intake(self._receiver.lm, self.settings.limits, self._receiver.profiles)
        intake.take(frame)
        manifest = intake.manifest
        if manifest is None:
            raise RemoteProtocolError("frame 0: expected a manifest")
        known = self._staged.get(manifest.transfer_id)
        if known is not None and known.cache_id and known.cache_id not in self.store:
            self._drop(known)  # it was complete, and its cache is gone: take it anew
            known = None
        if known is not None:
            if known.manifest_frame != frame:
                raise RemoteProtocolError("frame 0: this transfer id belongs to another manifest")
            known.owner, known.touched_at = me, time.monotonic()
            return known
        if sum(not staged.cache_id for staged in self._staged.values()) >= self.settings.max_transfers:
            raise LimitError(f"at most {self.settings.max_transfers} transfers at a time; try again later")
        self.store.reserve(intake.needed_bytes)
        staged = _Staged(intake, frame, intake.needed_bytes, me, time.monotonic())
        self._staged[manifest.transfer_id] = staged
        return staged

    def _keep(self, staged: _Staged, held: Held) -> None:
        self.store.release(staged.reserved_bytes)
        staged.reserved_bytes = 0
        staged.receipt = held.receipt
        staged.cache_id = self.store.put(held, held.nbytes)
        staged.intake.release()  # the store's bound and lifetime decide from here on
        receipt = held.receipt
        log.info(
            "transfer %s complete: %d bytes, %s", receipt.transfer_id, receipt.wire_bytes, receipt.recipe
        )
        read_s = held.receipt.stage_s.get("read")
        if read_s:
            self._prefill_tokens_per_s = held.receipt.context_tokens / read_s

    def _drop(self, staged: _Staged) -> None:
        self.store.release(staged.reserved_bytes)
        staged.reserved_bytes = 0
        if staged.intake.manifest is not None:
            self._staged.pop(staged.intake.manifest.transfer_id, None)

    def sweep(self) -> None:
        """Forget what has expired: caches past their lifetime, broken transfers nobody resumed."""
        self.store.sweep()
        oldest = time.monotonic() - self.settings.resume_lifetime_s
        for staged in [s for s in self._staged.values() if s.touched_at < oldest]:
            self._drop(staged)

    def _status(self, staged: _Staged, state: str) -> PushStatus:
        next_sequence = staged.intake.session.next_sequence
        return PushStatus(state, next_sequence, staged.cache_id, staged.receipt)  # type: ignore[arg-type]

    def transfer_status(self, transfer_id: bytes) -> PushStatus:
        self.sweep()
        staged = self._staged.get(transfer_id)
        if staged is None:
            raise NotFoundError("no transfer with this id: never here, failed or expired")
        return self._status(staged, "complete" if staged.cache_id else "accepted")

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Answer from a held cache, a token at a time, on a view of its own."""
        held = self.store.get(ask.cache_id)
        most = self.settings.max_new_tokens
        if ask.max_new_tokens > most:
            raise ContextError(f"max_new_tokens is at most {most} here, got {ask.max_new_tokens}")

        def steps() -> Iterator[Step]:
            return self._receiver.generate(
                held,
                ask.question,
                max_new_tokens=ask.max_new_tokens or DEFAULT_NEW_TOKENS,
                temperature=ask.temperature,
                seed=ask.seed,
            )

        first_s = last_s = 0.0
        async for step in stream(steps):
            first_s, last_s = first_s or step.elapsed_s, step.elapsed_s
            yield Piece(step.text, (step.token_id,))
        receipt = held.receipt.with_stages(first_token=first_s, generate=last_s - first_s)
        yield Piece("", (), True, receipt)

    def delete_cache(self, cache_id: str) -> None:
        self.store.delete(cache_id)


async def _first(frames: AsyncIterator[bytes]) -> bytes:
    async for frame in frames:
        return frame
    raise TruncatedError("the stream ended before its first frame")


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end even when cancelled: a thread cannot be stopped half-way."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _id(staged: _Staged) -> str:
    manifest = staged.intake.manifest
    return manifest.transfer_id.hex() if manifest else "?"
