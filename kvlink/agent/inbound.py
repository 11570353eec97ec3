"""Inbound transfers: what each is, whose it is, and what an event in its life means here.

Every transfer is the property of the peer that began it. What may follow on what is decided by the table of
`wire.lifecycle`; here are the memory, the files and the locks that go with it. Until its end a stream that
breaks can be continued by a new one at the frame that is missing; a second stream for a live transfer takes
it over: the first one's connection is taken for dead.
With staging on disk both the transfers on their way and the caches that they became outlive a restart.

Does not know: gRPC, questions. Place on the path: between the receiver's service and its intake.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvlink.agent.admission import Gate, Ticket
from kvlink.agent.receiver import Held, Intake, Receiver
from kvlink.agent.settings import ReceiverSettings
from kvlink.agent.shares import Whose
from kvlink.agent.staging import Staged, Staging
from kvlink.agent.store import Store
from kvlink.agent.threads import to_thread
from kvlink.errors import AccessError, BusyError, KvlinkError, NotFoundError, RemoteProtocolError
from kvlink.observe import Observer
from kvlink.payload import Base
from kvlink.receipt import Receipt
from kvlink.transport.api import Caller, PushState, PushStatus
from kvlink.wire.lifecycle import Event, Lifecycle

log = logging.getLogger("kvlink.receiver")

_ENDED = 4096
"""Transfers whose end is remembered."""
_WHY: dict[Event, str] = {
    "idle": "nothing came after its manifest",
    "late": "the deadline of {deadline_s:g} s has passed: {frames} frames of {size:,} bytes came, no segment has closed",
    "overdue": "not complete within {waits.whole_s:g} s",
    "abandoned": "broken, and not resumed within {waits.resume_s:g} s",
}
"""What a peer is told of an end that time alone has brought."""


@dataclass(slots=True)
class InboundTransfer:
    """A transfer on its way in, or one whose cache is held."""

    intake: Intake
    manifest_frame: bytes
    caller: Caller
    reserved_bytes: int
    ticket: Ticket
    life: Lifecycle
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

    @property
    def whose(self) -> Whose:
        return Whose.left_by(self.caller)


class InboundTransfers:
    """The transfers of one receiver agent. For one event loop."""

    def __init__(
        self, receiver: Receiver, store: Store[Held], settings: ReceiverSettings, observer: Observer
    ) -> None:
        self.settings = settings
        self.gate = Gate(
            "transfers", settings.max_transfers, places_each=settings.max_peer_transfers,
            waiting=settings.max_waiting, wait_s=settings.wait_s,
        )  # fmt: skip
        self._receiver, self._store, self._observer = receiver, store, observer
        told = settings.max_staged_bytes, settings.max_peer_staged_bytes
        self._staging = Staging(settings.staging, *told) if settings.staging else None
        self._transfers: dict[bytes, InboundTransfer] = {}
        self._ended: OrderedDict[bytes, tuple[Lifecycle, str]] = OrderedDict()
        """Transfer id → its end and its owner, of those that left nothing to answer from."""
        self._on_disk: dict[str, tuple[bytes, float]] = {}
        """Cache id → transfer id and expiry (wall clock) of what is on disk."""
        self._look_at_disk()

    def __len__(self) -> int:
        return len(self._transfers)

    async def take(self, transfer: InboundTransfer, stream: int, frame: bytes) -> bool:
        """Take one frame that `stream` has brought. Whether frames have become durable. Its lock is held.

        Raises what the life of the transfer refuses, and what is wrong with the frame.
        """
        transfer.life.after("frame", time.monotonic(), stream=stream)  # may it come at all?
        before = transfer.intake.session.next_sequence
        try:
            durable = await to_thread(self._take, transfer, frame)
        finally:
            if transfer.intake.session.next_sequence > before:  # cancelled or not, it was taken
                segments = transfer.intake.segments
                transfer.life = transfer.life.after("frame", time.monotonic(), segments=segments)
        await self.settle(transfer)
        return durable

    def _take(self, transfer: InboundTransfer, frame: bytes) -> bool:
        segments = transfer.intake.segments
        transfer.intake.take(frame)
        transfer.unsaved_bytes += len(frame)
        if transfer.file is not None:
            transfer.unsaved.append(frame)
        closed = transfer.intake.segments > segments
        due = closed or transfer.unsaved_bytes >= self.settings.durable_bytes
        if due or transfer.intake.held is not None:
            self._save(transfer)
        return due

    async def settle(self, transfer: InboundTransfer) -> None:
        """Keep what is complete, or what was enough in an earlier life of this agent. Its lock is held; a stream
        that died in the last moment left it to us."""
        held = transfer.intake.held
        if held is not None and transfer.life.on_its_way:
            await to_thread(self._save, transfer)
            self._keep(transfer, held, "end" if transfer.intake.session.state == "done" else "deadline")

    @staticmethod
    def _save(transfer: InboundTransfer) -> None:
        if transfer.file is not None and transfer.unsaved:
            transfer.file.add(*transfer.unsaved)
        transfer.unsaved, transfer.unsaved_bytes = [], 0

    async def admit(self, frame: bytes, caller: Caller) -> InboundTransfer:
        """Open a transfer, or find the one that this manifest resumes, in memory or on disk.

        From now on `life.stream` numbers the stream that may feed it.
        """
        intake = await to_thread(self._intake, frame)
        key = intake.manifest.transfer_id if intake.manifest else b""
        if key in self._ended:
            self._ended[key][0].after("resume", time.monotonic())
        known = self._transfers.get(key)
        if known is not None and known.cache_id and known.cache_id not in self._store:
            self.apply(known, "gone")  # take it anew, or from disk
            known = None
        if known is None:
            await self._recall_base(intake, caller)
            ticket = await self.gate.enter(caller.account)
            if key in self._transfers:  # another stream was faster
                ticket.leave()
            else:
                await self._open(key, intake, frame, caller, ticket)
        transfer = self._transfers.get(key)
        if transfer is None:  # it was refused under another stream meanwhile
            raise BusyError("frame 0: this transfer was just given up; try again")
        if transfer.caller.name != caller.name:
            raise AccessError("frame 0: this transfer id is taken")
        if transfer.manifest_frame != frame:
            raise RemoteProtocolError("frame 0: this transfer id belongs to another manifest")
        self.apply(transfer, "resume")
        return transfer

    async def _open(self, key: bytes, intake: Intake, frame: bytes, caller: Caller, ticket: Ticket) -> None:
        """Make room for a transfer, and fill it with what an earlier life of this agent has kept."""
        try:
            self._store.reserve(intake.needed_bytes, Whose.left_by(caller))
        except KvlinkError:
            ticket.leave()
            raise
        deadline_s = intake.manifest.deadline_ms / 1e3 if intake.manifest else 0.0
        life = Lifecycle.begun(time.monotonic(), deadline_s)
        transfer = InboundTransfer(intake, frame, caller, intake.needed_bytes, ticket, life)
        self._transfers[key] = transfer
        try:
            async with transfer.lock:
                with self._base_of(intake, caller) as base:
                    await to_thread(intake.begin, base)
                    await to_thread(self._recall, transfer, base)
                if transfer.intake.session.next_sequence > 1:
                    segments = transfer.intake.segments
                    transfer.life = transfer.life.after("frame", time.monotonic(), segments=segments)
                await self.settle(transfer)
        except BaseException:
            self._let_go(transfer)
            raise

    @contextmanager
    def _base_of(self, intake: Intake, caller: Caller) -> Iterator[Held | None]:
        """The cache that a transfer adds to, whole until this is left; None where it has none, or none is here."""
        base = intake.manifest.base if intake.manifest else None
        found = self._find_base(base, caller) if base else None
        if found is None:
            yield None
            return
        with self._store.lease(found, caller.name) as held:
            yield held

    def _find_base(self, base: Base, caller: Caller) -> str | None:
        named = base.digest.hex()
        return self._store.search(lambda held: held.receipt.cache_digest == named, caller.name)

    async def _recall_base(self, intake: Intake, caller: Caller) -> None:
        """Bring the base of a transfer back into memory where it is on disk only."""
        base = intake.manifest.base if intake.manifest else None
        if base is None or self._staging is None or self._find_base(base, caller):
            return
        for cache_id, (key, _) in list(self._on_disk.items()):
            if self._staging.notes(key).get("cache_digest") == base.digest.hex():
                await self.recall_cache(cache_id)
                return

    def _recall(self, transfer: InboundTransfer, base: Held | None) -> None:
        """Take the frames that are on disk, or begin a file there; in a thread."""
        key, frame = transfer.key, transfer.manifest_frame
        if self._staging is None:
            return
        notes = self._staging.notes(key)
        if notes and notes.get("owner") != transfer.caller.name:
            raise AccessError("frame 0: this transfer id is taken")
        found = self._staging.resume(key)
        if found is not None:
            transfer.file, frames = found
            try:
                if notes and frames[:1] == [frame]:  # without notes nobody knows whose it is
                    for kept in frames[1:]:
                        transfer.intake.take(kept)
                    if notes.get("enough") and transfer.intake.held is None:
                        transfer.intake.held = transfer.intake.hold()
                    transfer.cache_id = str(notes.get("cache_id", "")) if transfer.intake.held else ""
                    log.info(
                        "transfer goes on from disk at frame %d", len(frames), extra=log_fields(transfer)
                    )
                    return
            except KvlinkError as error:
                log.warning("what was on disk is of no use: %s", error, extra=log_fields(transfer))
            transfer.file.close()
        transfer.intake = self._intake(frame)
        transfer.intake.begin(base)
        transfer.file = self._staging.begin(key, _whose(transfer.caller), transfer.whose.account)
        transfer.file.add(frame)

    def _intake(self, frame: bytes) -> Intake:
        """An intake that has taken the manifest. Raises what is wrong with it."""
        there = self._receiver
        intake = Intake(there.lm, self.settings.limits, there.profiles, there.added_bytes)
        intake.take(frame)
        if intake.manifest is None:
            raise RemoteProtocolError("frame 0: expected a manifest")
        return intake

    def _keep(self, transfer: InboundTransfer, held: Held, event: Event) -> None:
        """Held: the cache moves into the store, and the transfer's place is free."""
        caller = transfer.caller
        self._store.release(transfer.reserved_bytes, transfer.whose)
        transfer.reserved_bytes = 0
        transfer.receipt = receipt = held.receipt
        _, until = self._on_disk.get(transfer.cache_id, (b"", time.time() + self.settings.cache_lifetime_s))
        transfer.cache_id = self._store.put(
            held,
            held.nbytes,
            max(until - time.time(), 1e-3),
            whose=transfer.whose,
            key=transfer.cache_id,
        )
        transfer.intake.release()  # the store's bound and lifetime decide from here on
        if self._staging is not None and transfer.cache_id not in self._on_disk:
            for earlier in [name for name, (key, _) in self._on_disk.items() if key == transfer.key]:
                del self._on_disk[earlier]  # its file made room, and the transfer has come again
            self._on_disk[transfer.cache_id] = (transfer.key, until)
            notes = {
                **_whose(caller),
                "cache_id": transfer.cache_id,
                "expires_at": until,
                "cache_digest": receipt.cache_digest,
                "enough": event == "deadline",
            }
            try:
                self._staging.note(transfer.key, notes)
            except OSError as error:  # it is held all the same
                log.warning(
                    "a cache will not outlive a restart: %s", error.strerror, extra=log_fields(transfer)
                )
        if self._staging is not None:
            self._staging.rest(transfer.key)
        self.apply(transfer, event)
        told = {**log_fields(transfer), "receipt": receipt.to_dict()}
        log.info(
            "transfer %s: %d bytes, %s", transfer.life.state, receipt.wire_bytes, receipt.recipe, extra=told
        )
        self._observer.cost("received_bytes", receipt)

    def apply(
        self, transfer: InboundTransfer, event: Event, why: str = "", *, stream: int | None = None
    ) -> None:
        """What follows on an event. What has failed or was cancelled leaves nothing behind."""
        before = transfer.life
        life = transfer.life = before.after(event, time.monotonic(), stream=stream, why=why)
        if life.state == before.state:
            return
        if life.state == "broken":
            where = transfer.intake.session.next_sequence
            log.info("transfer cut at frame %d", where, extra=log_fields(transfer))
        elif not life.on_its_way and before.on_its_way:
            self._end(transfer)
        elif life.state == "forgotten":
            self._transfers.pop(transfer.key, None)

    def _end(self, transfer: InboundTransfer) -> None:
        """A transfer is no more on its way."""
        life = transfer.life
        transfer.ticket.leave()
        if transfer.file is not None:
            transfer.file.close()
        self._observer.count("transfers", "Transfers by their end", state=life.state)
        if life.held:
            return
        log.info("transfer %s: %s", life.state, life.why, extra=log_fields(transfer))
        self._let_go(transfer)
        if self._staging is not None:
            self._staging.forget(transfer.key)
        if life.state != "forgotten":  # its id may begin anew
            self._ended[transfer.key] = (life, transfer.caller.name)
            while len(self._ended) > _ENDED:
                self._ended.popitem(last=False)

    def _let_go(self, transfer: InboundTransfer) -> None:
        """Free a transfer's memory and place."""
        self._store.release(transfer.reserved_bytes, transfer.whose)
        transfer.reserved_bytes = 0
        transfer.ticket.leave()
        transfer.intake.release()
        if self._staging is not None:
            self._staging.rest(transfer.key)
        self._transfers.pop(transfer.key, None)

    def sweep(self) -> None:
        """End what is over: transfers that nobody resumes or past their deadline, caches on disk."""
        for transfer in list(self._transfers.values()):
            if transfer.cache_id and transfer.cache_id not in self._store:
                self.apply(transfer, "gone")
            elif not transfer.lock.locked():  # at work: the next sweep will see
                self.expire(transfer)
        for cache_id, (key, until) in list(self._on_disk.items()):
            if until <= time.time():
                self._forget_on_disk(cache_id, key)

    def expire(self, transfer: InboundTransfer, now: float = 0.0) -> Event | None:
        """Apply what time alone has brought to a transfer by `now`, if anything. Its lock is free, or the
        caller's."""
        waits = self.settings.waits
        event = transfer.life.due(max(now, time.monotonic()), waits)
        if event == "deadline":
            self._keep(transfer, transfer.intake.hold(), event)
        elif event is not None:
            came, told = transfer.intake.session.next_sequence, transfer.life
            why = _WHY.get(event, "").format(
                waits=waits,
                deadline_s=told.deadline_at - told.began_at,
                frames=came,
                size=transfer.intake.nbytes,
            )
            self.apply(transfer, event, why)
        return event

    def _forget_on_disk(self, cache_id: str, key: bytes) -> None:
        del self._on_disk[cache_id]
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
                self._on_disk[notes["cache_id"]] = (key, until)

    async def recall_cache(self, cache_id: str) -> None:
        """Bring a cache that is on disk only back into memory; any other id is left alone."""
        key, _ = self._on_disk.get(cache_id, (b"", 0.0))
        if not key or self._staging is None or cache_id in self._store:
            return
        notes, manifest_frame = self._staging.notes(key), self._staging.first_frame(key)
        if manifest_frame:
            owner = _noted(notes)
            transfer = await self.admit(manifest_frame, owner)
            async with transfer.lock:  # another question may be bringing it back already
                pass

    def status(self, transfer: InboundTransfer, state: PushState | None = None) -> PushStatus:
        return PushStatus(
            state or _told(transfer.life),
            transfer.intake.session.next_sequence,
            transfer.cache_id,
            transfer.receipt,
            transfer.life.why,
        )

    def find(self, transfer_id: bytes, caller: Caller) -> PushStatus:
        """Where a transfer of this peer stands. Raises NotFoundError."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.caller.name == caller.name:
            return self.status(transfer)
        life, owner = self._ended.get(transfer_id, (None, ""))
        if life is not None and owner == caller.name:
            return PushStatus(_told(life), 0, why=life.why)
        raise NotFoundError("no transfer with this id: never here or expired")

    async def cancel(self, transfer_id: bytes, caller: Caller) -> None:
        """Give up a transfer that is on its way; what is held stays. Unknown ids are fine."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.caller.name == caller.name:
            async with transfer.lock:
                self.apply(transfer, "cancel", "given up by the sender")

    def forget_cache(self, cache_id: str, caller: Caller) -> None:
        """Remove a cache, in memory and on disk.

        Raises NotFoundError where it is none of this peer's business, AccessError where it may only read.
        """
        key, _ = self._on_disk.get(cache_id, (b"", 0.0))
        if key and cache_id not in self._store:
            notes = self._staging.notes(key) if self._staging else {}
            self._store.check_removable(Whose.left_by(_noted(notes)), caller.name)
        else:
            self._store.delete(cache_id, caller.name)
        if key:
            self._forget_on_disk(cache_id, key)


def _whose(caller: Caller) -> dict[str, Any]:
    """What is noted on disk of who began a transfer."""
    return {
        "owner": caller.name, "readers": list(caller.readers), "asked_by": caller.asked_by, "host": caller.host,
    }  # fmt: skip


def _noted(notes: dict[str, Any]) -> Caller:
    """Who began a transfer, as it was noted."""
    told = {name: str(notes.get(name, "")) for name in ("owner", "asked_by", "host")}
    readers = tuple(map(str, notes.get("readers", ())))
    return Caller(told["owner"], readers, asked_by=told["asked_by"], host=told["host"])


def log_fields(transfer: InboundTransfer) -> dict[str, Any]:
    """What every log line of a transfer says beside its message."""
    return {"transfer": transfer.key.hex(), "peer": transfer.caller.name}


def _told(life: Lifecycle) -> PushState:
    """The state that a peer is told."""
    if life.state in ("complete", "enough", "failed", "cancelled"):
        return life.state
    return "accepted"
