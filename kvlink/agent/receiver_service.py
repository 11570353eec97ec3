"""The receiver agent as a service: transfers in, caches held, questions answered.

Every transfer is the property of the peer that began it and ends in exactly one state: complete,
failed or cancelled. Until then a stream that breaks can be continued by a new one at the frame that is
missing; a second stream for a live transfer takes it over: the first one's connection is taken for dead.
With staging on disk both the transfers on their way and the caches that they became outlive a restart.

Does not know: gRPC. Place on the path: the receiver's edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlink._release import RELEASE
from kvlink.agent.admission import Gate, Ticket
from kvlink.agent.receiver import Held, Intake, Receiver
from kvlink.agent.staging import Staged, Staging
from kvlink.agent.store import Store
from kvlink.agent.threads import stream, to_thread
from kvlink.errors import (
    AccessError,
    ContextError,
    DeadlineError,
    KvlinkError,
    NotFoundError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.generate import DEFAULT_NEW_TOKENS, Step
from kvlink.observe import Observer
from kvlink.receipt import Capabilities, Receipt
from kvlink.transport.api import NOBODY, Ask, Caller, Piece, PushState, PushStatus
from kvlink.wire.session import Limits

log = logging.getLogger("kvlink.receiver")

DURABLE_BYTES = 1_000_000
"""Frames are made durable, and the sender is told, whenever so many bytes have come."""
_ENDED = 4096
"""Transfers whose end is remembered."""


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """Bounds of a receiver agent. Lifetimes in seconds; 0 for one peer means as for all.

    `transfer_deadline_s`: from a transfer's first frame to its end, whatever breaks in between.
    `idle_s`: a stream that brings no frame for so long is ended. `unused_s`: a cache that nobody has
    asked yet is not made room of so soon.
    """

    max_held_bytes: int = 8_000_000_000
    max_peer_bytes: int = 0
    cache_lifetime_s: float = 3600.0
    unused_s: float = 30.0
    resume_lifetime_s: float = 120.0
    transfer_deadline_s: float = 900.0
    idle_s: float = 60.0
    max_transfers: int = 32
    max_peer_transfers: int = 0
    max_generations: int = 8
    max_waiting: int = 64
    wait_s: float = 10.0
    max_new_tokens: int = 1024
    staging: Path | None = None
    max_staged_bytes: int = 16_000_000_000
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class _Incoming:
    """A transfer on its way in. `feeder` is the stream that may feed it, one frame at a time."""

    intake: Intake
    manifest_frame: bytes
    caller: Caller
    reserved_bytes: int
    ticket: Ticket
    feeder: object
    began_at: float
    touched_at: float
    state: PushState = "accepted"
    why: str = ""
    cache_id: str = ""
    receipt: Receipt = field(default_factory=Receipt)
    file: Staged | None = None
    unsaved: list[bytes] = field(default_factory=list)
    unsaved_bytes: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def key(self) -> bytes:
        manifest = self.intake.manifest
        return manifest.transfer_id if manifest else b""


class ReceiverService:
    """Handles the calls of `ReceiverService` in the proto."""

    def __init__(
        self, receiver: Receiver, settings: ReceiverSettings | None = None, observer: Observer | None = None
    ) -> None:
        self._receiver = receiver
        self.settings = told = settings or ReceiverSettings()
        self.observer = observer or Observer("receiver")
        self.store: Store[Held] = Store(
            "cache", told.max_held_bytes, told.cache_lifetime_s,
            max_owner_bytes=told.max_peer_bytes, fresh_s=told.unused_s, wipe=Held.wipe,
        )  # fmt: skip
        self._transfers = Gate(
            "transfers", told.max_transfers, places_each=told.max_peer_transfers,
            waiting=told.max_waiting, wait_s=told.wait_s,
        )  # fmt: skip
        self._generations = Gate(
            "generations", told.max_generations, waiting=told.max_waiting, wait_s=told.wait_s
        )
        self._staging = Staging(told.staging, told.max_staged_bytes) if told.staging else None
        self._incoming: dict[bytes, _Incoming] = {}
        self._ended: OrderedDict[bytes, tuple[PushState, str, str]] = OrderedDict()
        self._shelf: dict[str, tuple[bytes, float]] = {}
        """Cache id → transfer id and expiry (wall clock) of what is on disk."""
        self._prefill_tokens_per_s = 0.0
        self._look_at_disk()
        for name, what, read in (
            ("held_bytes", "Bytes of held caches", lambda: self.store.held_bytes),
            ("reserved_bytes", "Bytes promised to transfers", lambda: self.store.reserved_bytes),
            ("transfers_open", "Transfers on their way in", lambda: self._transfers.inside),
            ("transfers_waiting", "Transfers that wait for a place", lambda: self._transfers.queued),
            ("generations_open", "Generations at work", lambda: self._generations.inside),
            ("generations_waiting", "Generations that wait", lambda: self._generations.queued),
        ):
            self.observer.watch(name, what, read)

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

    async def push_cache(
        self, frames: AsyncIterator[bytes], caller: Caller = NOBODY
    ) -> AsyncGenerator[PushStatus, None]:
        """Take a transfer: accepted, durable as frames are kept, complete. See the proto."""
        me = object()
        incoming = await self._admit(await self._next(frames), me, caller)
        with self.observer.span("receive", caller.trace, transfer=incoming.key.hex()) as told:
            try:
                async with aclosing(self._feed(incoming, frames, me)) as statuses:
                    async for status in statuses:
                        yield status
            except (TruncatedError, asyncio.CancelledError, GeneratorExit):
                # Resumable: the sweep ends it if nobody comes.
                log.info(
                    "transfer cut at frame %d", incoming.intake.session.next_sequence, extra=_of(incoming)
                )
                raise
            except Exception as error:
                if incoming.feeder is me:
                    self._end(incoming, "failed", f"{type(error).__name__}: {error}")
                raise
            finally:
                told.attributes |= {"state": incoming.state, "wire_bytes": incoming.receipt.wire_bytes}

    async def _feed(
        self, incoming: _Incoming, frames: AsyncIterator[bytes], me: object
    ) -> AsyncGenerator[PushStatus, None]:
        """Take the frames of one stream into a transfer that was admitted."""
        async with incoming.lock:  # what an earlier stream brought last is counted
            status = self._status(incoming)
        yield status
        if status.state == "complete":
            return
        while True:
            frame = await self._next(frames, incoming)
            async with incoming.lock:
                if incoming.feeder is not me:
                    raise RemoteProtocolError("another stream has taken this transfer over")
                if incoming.state != "accepted":
                    raise DeadlineError(f"this transfer is over: {incoming.why or incoming.state}")
                durable = await to_thread(self._take, incoming, frame)
                incoming.touched_at = time.monotonic()
                if incoming.intake.held is not None:
                    self._keep(incoming, incoming.intake.held)
            if durable:
                yield self._status(incoming, "durable")
            if incoming.cache_id:
                yield self._status(incoming)
                return

    async def _next(self, frames: AsyncIterator[bytes], incoming: _Incoming | None = None) -> bytes:
        """The next frame of a stream. Raises TruncatedError where it ends, or brings none for long."""
        where = incoming.intake.session.next_sequence if incoming else 0
        try:
            return await asyncio.wait_for(anext(frames), self.settings.idle_s)
        except (StopAsyncIteration, TimeoutError) as error:
            how = (
                "ended"
                if isinstance(error, StopAsyncIteration)
                else f"brought nothing for {self.settings.idle_s:g} s"
            )
            raise TruncatedError(
                f"the stream {how} before frame {where}; the same transfer id and manifest resume it there"
            ) from None

    def _take(self, incoming: _Incoming, frame: bytes) -> bool:
        """Take one frame, in a thread. Whether frames have become durable since the last time."""
        usable = incoming.intake.usable
        incoming.intake.take(frame)
        incoming.unsaved_bytes += len(frame)
        if incoming.file is not None:
            incoming.unsaved.append(frame)
        due = incoming.unsaved_bytes >= DURABLE_BYTES or (incoming.intake.usable and not usable)
        if due or incoming.intake.held is not None:
            self._save(incoming)
        return due

    @staticmethod
    def _save(incoming: _Incoming) -> None:
        if incoming.file is not None and incoming.unsaved:
            incoming.file.add(*incoming.unsaved)
        incoming.unsaved, incoming.unsaved_bytes = [], 0

    async def _admit(self, frame: bytes, me: object, caller: Caller) -> _Incoming:
        """Open a transfer, or find the one that this manifest resumes, in memory or on disk."""
        self.sweep()
        intake = self._intake(frame)
        key = intake.manifest.transfer_id if intake.manifest else b""
        ended = self._ended.get(key)
        if ended is not None and ended[0] != "complete":
            raise RemoteProtocolError(
                f"frame 0: this transfer has {ended[0]}: {ended[2]}; a new attempt needs an id of its own"
            )
        known = self._incoming.get(key)
        if known is not None and known.cache_id and known.cache_id not in self.store:
            del self._incoming[key]  # it was complete, and its cache is gone: take it anew, or from disk
            known = None
        if known is None:
            ticket = await self._transfers.enter(caller.name)
            if key in self._incoming:  # another stream was faster
                ticket.leave()
            else:
                await self._open(key, intake, frame, caller, ticket, me)
        incoming = self._incoming[key]
        if incoming.caller.name != caller.name:
            raise AccessError("frame 0: this transfer id is taken")
        if incoming.manifest_frame != frame:
            raise RemoteProtocolError("frame 0: this transfer id belongs to another manifest")
        incoming.feeder, incoming.touched_at = me, time.monotonic()
        return incoming

    async def _open(
        self, key: bytes, intake: Intake, frame: bytes, caller: Caller, ticket: Ticket, me: object
    ) -> None:
        """Make room for a transfer, and fill it with what an earlier life of this agent has kept."""
        try:
            self.store.reserve(intake.needed_bytes, caller.name)
        except KvlinkError:
            ticket.leave()
            raise
        now = time.monotonic()
        incoming = _Incoming(intake, frame, caller, intake.needed_bytes, ticket, me, now, now)
        self._incoming[key] = incoming
        try:
            async with incoming.lock:
                await to_thread(self._recall, incoming)
                if incoming.intake.held is not None:
                    self._keep(incoming, incoming.intake.held)
        except BaseException:
            self._let_go(incoming)
            raise

    def _recall(self, incoming: _Incoming) -> None:
        """Take the frames that are on disk, or begin a file there; in a thread."""
        key, frame = incoming.key, incoming.manifest_frame
        if self._staging is None:
            return
        notes = self._staging.notes(key)
        if notes and notes.get("owner") != incoming.caller.name:
            raise AccessError("frame 0: this transfer id is taken")
        found = self._staging.resume(key)
        if found is not None:
            incoming.file, frames = found
            try:
                if frames[:1] == [frame]:
                    for kept in frames[1:]:
                        incoming.intake.take(kept)
                    incoming.cache_id = str(notes.get("cache_id", "")) if incoming.intake.held else ""
                    log.info("transfer goes on from disk at frame %d", len(frames), extra=_of(incoming))
                    return
            except KvlinkError as error:
                log.warning("what was on disk is of no use: %s", error, extra=_of(incoming))
            incoming.file.close()
        incoming.intake = self._intake(frame)
        notes = {"owner": incoming.caller.name, "readers": list(incoming.caller.readers)}
        incoming.file = self._staging.begin(key, notes)
        incoming.file.add(frame)

    def _intake(self, frame: bytes) -> Intake:
        """An intake that has taken the manifest. Raises what is wrong with it."""
        intake = Intake(self._receiver.lm, self.settings.limits, self._receiver.profiles)
        intake.take(frame)
        if intake.manifest is None:
            raise RemoteProtocolError("frame 0: expected a manifest")
        return intake

    def _keep(self, incoming: _Incoming, held: Held) -> None:
        """Complete: the cache moves into the store, and the transfer's place is free."""
        caller = incoming.caller
        self.store.release(incoming.reserved_bytes, caller.name)
        incoming.reserved_bytes = 0
        incoming.receipt = receipt = held.receipt
        incoming.cache_id = self.store.put(
            held, held.nbytes, owner=caller.name, readers=caller.readers, key=incoming.cache_id
        )
        incoming.intake.release()  # the store's bound and lifetime decide from here on
        if self._staging is not None and incoming.cache_id not in self._shelf:
            until = time.time() + self.settings.cache_lifetime_s
            self._shelf[incoming.cache_id] = (incoming.key, until)
            notes = {"owner": caller.name, "readers": list(caller.readers)}
            self._staging.note(incoming.key, {**notes, "cache_id": incoming.cache_id, "expires_at": until})
        self._end(incoming, "complete")
        log.info("transfer complete: %d bytes, %s", receipt.wire_bytes, receipt.recipe, extra=_of(incoming))
        for kind, count in receipt.bytes.items():
            self.observer.count("received_bytes", "Bytes of complete transfers", count, kind=kind)
        for stage, seconds in receipt.stage_s.items():
            self.observer.seconds("stage_seconds", "Seconds of a stage", seconds, stage=stage)
        read_s = receipt.stage_s.get("read")
        if read_s:
            self._prefill_tokens_per_s = receipt.context_tokens / read_s

    def _end(self, incoming: _Incoming, state: PushState, why: str = "") -> None:
        """The one end of a transfer. What has failed or was cancelled leaves nothing behind."""
        if incoming.state != "accepted":
            return
        incoming.state, incoming.why = state, why
        self._ended[incoming.key] = (state, incoming.caller.name, why)
        while len(self._ended) > _ENDED:
            self._ended.popitem(last=False)
        incoming.ticket.leave()
        if incoming.file is not None:
            incoming.file.close()
        self.observer.count("transfers", "Transfers by their end", state=state)
        if state != "complete":
            log.info("transfer %s: %s", state, why, extra=_of(incoming))
            self._let_go(incoming)
            if self._staging is not None:
                self._staging.forget(incoming.key)

    def _let_go(self, incoming: _Incoming) -> None:
        """Free a transfer's memory and place."""
        self.store.release(incoming.reserved_bytes, incoming.caller.name)
        incoming.reserved_bytes = 0
        incoming.ticket.leave()
        incoming.intake.release()
        self._incoming.pop(incoming.key, None)

    def sweep(self) -> None:
        """End what is over: caches past their lifetime, transfers nobody resumes or past their deadline."""
        self.store.sweep()
        now, told = time.monotonic(), self.settings
        for incoming in list(self._incoming.values()):
            quiet = incoming.touched_at < now - told.resume_lifetime_s
            if incoming.cache_id:
                if quiet:
                    del self._incoming[incoming.key]
            elif incoming.lock.locked():
                continue
            elif incoming.began_at < now - told.transfer_deadline_s:
                self._end(incoming, "failed", f"not complete within {told.transfer_deadline_s:g} s")
            elif quiet:
                self._end(incoming, "failed", f"broken, and not resumed within {told.resume_lifetime_s:g} s")
        for cache_id, (key, until) in list(self._shelf.items()):
            if until <= time.time():
                self._unshelve(cache_id, key)

    def _unshelve(self, cache_id: str, key: bytes) -> None:
        del self._shelf[cache_id]
        if self._staging is not None:
            self._staging.forget(key)

    def _look_at_disk(self) -> None:
        """Find what an earlier life has left: caches that are still good, transfers that may go on."""
        for key in self._staging or ():
            notes = self._staging.notes(key) if self._staging else {}
            until = notes.get("expires_at", notes.get("at", 0) + self.settings.resume_lifetime_s)
            if until <= time.time():
                self._staging.forget(key)  # type: ignore[union-attr]
            elif "cache_id" in notes:
                self._shelf[notes["cache_id"]] = (key, until)

    async def _from_shelf(self, cache_id: str) -> None:
        """Bring a cache that is on disk only back into memory."""
        key, _ = self._shelf[cache_id]
        if self._staging is None or cache_id in self.store:
            return
        notes = self._staging.notes(key)
        found = self._staging.resume(key)
        if found is not None and found[1]:
            found[0].close()
            owner = Caller(str(notes.get("owner", "")), tuple(notes.get("readers", ())))
            await self._admit(found[1][0], object(), owner)

    def _status(self, incoming: _Incoming, state: PushState | None = None) -> PushStatus:
        return PushStatus(
            state or incoming.state,
            incoming.intake.session.next_sequence,
            incoming.cache_id,
            incoming.receipt,
            incoming.why,
        )

    async def transfer_status(self, transfer_id: bytes, caller: Caller = NOBODY) -> PushStatus:
        self.sweep()
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.caller.name == caller.name:
            return self._status(incoming)
        ended = self._ended.get(transfer_id)
        if ended is not None and ended[0] != "complete" and ended[1] == caller.name:
            return PushStatus(ended[0], 0, why=ended[2])
        raise NotFoundError("no transfer with this id: never here or expired")

    async def cancel_transfer(self, transfer_id: bytes, caller: Caller = NOBODY) -> None:
        """Give up a transfer that is on its way; what is complete stays. Unknown ids are fine."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.caller.name == caller.name:
            async with incoming.lock:
                self._end(incoming, "cancelled", "given up by the sender")

    async def generate(self, ask: Ask, caller: Caller = NOBODY) -> AsyncGenerator[Piece, None]:
        """Answer from a held cache, a token at a time, on a view of its own."""
        most = self.settings.max_new_tokens
        if ask.max_new_tokens > most:
            raise ContextError(f"max_new_tokens is at most {most} here, got {ask.max_new_tokens}")
        if ask.cache_id in self._shelf:
            await self._from_shelf(ask.cache_id)
        with self.store.lease(ask.cache_id, caller.name) as held:  # stays whole until the last token

            def steps() -> Iterator[Step]:
                return self._receiver.generate(
                    held,
                    ask.question,
                    max_new_tokens=ask.max_new_tokens or DEFAULT_NEW_TOKENS,
                    temperature=ask.temperature,
                    seed=ask.seed,
                )

            with (
                await self._generations.enter(caller.name),
                self.observer.span("generate", caller.trace, transfer=held.receipt.transfer_id) as told,
            ):
                first_s = last_s = 0.0
                count = 0
                async with aclosing(stream(steps)) as made:
                    async for step in made:
                        first_s, last_s, count = first_s or step.elapsed_s, step.elapsed_s, count + 1
                        yield Piece(step.text, (step.token_id,))
                told.attributes |= {"tokens": count, "first_token_s": first_s}
            self.observer.count("generated_tokens", "Tokens generated", count)
            self.observer.seconds("stage_seconds", "Seconds of a stage", first_s, stage="first_token")
            receipt = held.receipt.with_stages(first_token=first_s, generate=last_s - first_s)
            yield Piece("", (), True, receipt)

    def delete_cache(self, cache_id: str, caller: Caller = NOBODY) -> None:
        if cache_id in self._shelf and cache_id not in self.store:
            notes = self._staging.notes(self._shelf[cache_id][0]) if self._staging else {}
            if caller.name not in (notes.get("owner"), *notes.get("readers", ())):
                raise NotFoundError("no cache with this id: never there, deleted or expired")
        else:
            self.store.delete(cache_id, caller.name)
        if cache_id in self._shelf:
            self._unshelve(cache_id, self._shelf[cache_id][0])


def _of(incoming: _Incoming) -> dict[str, Any]:
    """What every log line of a transfer says beside its message."""
    return {"transfer": incoming.key.hex(), "peer": incoming.caller.name}
