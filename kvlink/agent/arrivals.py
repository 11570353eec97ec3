"""Transfers on their way in: who began them, how far they are, and their one end.

Every transfer is the property of the peer that began it and ends in exactly one state: complete,
failed or cancelled. Until then a stream that breaks can be continued by a new one at the frame that is
missing; a second stream for a live transfer takes it over: the first one's connection is taken for dead.
With staging on disk both the transfers on their way and the caches that they became outlive a restart.

Does not know: gRPC, questions. Place on the path: between the receiver's service and its intake.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
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
from kvlink.receipt import Receipt
from kvlink.transport.api import Caller, PushState, PushStatus

log = logging.getLogger("kvlink.receiver")

_ENDED = 4096
"""Transfers whose end is remembered."""


@dataclass(slots=True)
class Incoming:
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
    begun: bool = False
    """Whether a frame has come after the manifest."""
    receipt: Receipt = field(default_factory=Receipt)
    file: Staged | None = None
    unsaved: list[bytes] = field(default_factory=list)
    unsaved_bytes: int = 0
    streams: int = 0
    """Streams that are open for it, dead or alive: while there is one, nobody has given it up."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def key(self) -> bytes:
        manifest = self.intake.manifest
        return manifest.transfer_id if manifest else b""

    @property
    def whose(self) -> Whose:
        return Whose.left_by(self.caller)


class Arrivals:
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
        self._incoming: dict[bytes, Incoming] = {}
        self._ended: OrderedDict[bytes, tuple[PushState, str, str]] = OrderedDict()
        """Transfer id → state, owner, why."""
        self._shelf: dict[str, tuple[bytes, float]] = {}
        """Cache id → transfer id and expiry (wall clock) of what is on disk."""
        self._look_at_disk()

    def __len__(self) -> int:
        return len(self._incoming)

    def take(self, incoming: Incoming, frame: bytes) -> bool:
        """Take one frame, in a thread. Whether frames have become durable since the last time."""
        usable = incoming.intake.usable
        incoming.intake.take(frame)
        incoming.begun = True
        incoming.unsaved_bytes += len(frame)
        if incoming.file is not None:
            incoming.unsaved.append(frame)
        due = incoming.unsaved_bytes >= self.settings.durable_bytes or (incoming.intake.usable and not usable)
        if due or incoming.intake.held is not None:
            self._save(incoming)
        return due

    async def settle(self, incoming: Incoming) -> None:
        """Keep what is complete. Its lock is held; a stream that died in the last moment left it to us."""
        held = incoming.intake.held
        if held is not None and incoming.state == "accepted":
            await to_thread(self._save, incoming)
            self._keep(incoming, held)

    @staticmethod
    def _save(incoming: Incoming) -> None:
        if incoming.file is not None and incoming.unsaved:
            incoming.file.add(*incoming.unsaved)
        incoming.unsaved, incoming.unsaved_bytes = [], 0

    async def admit(self, frame: bytes, me: object, caller: Caller) -> Incoming:
        """Open a transfer, or find the one that this manifest resumes, in memory or on disk."""
        intake = await to_thread(self._intake, frame)
        key = intake.manifest.transfer_id if intake.manifest else b""
        ended = self._ended.get(key)
        if ended is not None and ended[0] != "complete":
            raise RemoteProtocolError(
                f"frame 0: this transfer has {ended[0]}: {ended[2]}; a new attempt needs an id of its own"
            )
        known = self._incoming.get(key)
        if known is not None and known.cache_id and known.cache_id not in self._store:
            del self._incoming[key]  # it was complete, and its cache is gone: take it anew, or from disk
            known = None
        if known is None:
            ticket = await self.gate.enter(caller.account)
            if key in self._incoming:  # another stream was faster
                ticket.leave()
            else:
                await self._open(key, intake, frame, caller, ticket, me)
        incoming = self._incoming.get(key)
        if incoming is None:  # it was refused under another stream meanwhile
            raise BusyError("frame 0: this transfer was just given up; try again")
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
            self._store.reserve(intake.needed_bytes, Whose.left_by(caller))
        except KvlinkError:
            ticket.leave()
            raise
        now = time.monotonic()
        incoming = Incoming(intake, frame, caller, intake.needed_bytes, ticket, me, now, now)
        self._incoming[key] = incoming
        try:
            async with incoming.lock:
                await to_thread(self._recall, incoming)
                await self.settle(incoming)
        except BaseException:
            self._let_go(incoming)
            raise

    def _recall(self, incoming: Incoming) -> None:
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
                if notes and frames[:1] == [frame]:  # without notes nobody knows whose it is
                    for kept in frames[1:]:
                        incoming.intake.take(kept)
                        incoming.begun = True
                    incoming.cache_id = str(notes.get("cache_id", "")) if incoming.intake.held else ""
                    log.info(
                        "transfer goes on from disk at frame %d", len(frames), extra=log_fields(incoming)
                    )
                    return
            except KvlinkError as error:
                log.warning("what was on disk is of no use: %s", error, extra=log_fields(incoming))
            incoming.file.close()
        incoming.intake = self._intake(frame)
        incoming.file = self._staging.begin(key, _whose(incoming.caller), incoming.whose.account)
        incoming.file.add(frame)

    def _intake(self, frame: bytes) -> Intake:
        """An intake that has taken the manifest. Raises what is wrong with it."""
        intake = Intake(self._receiver.lm, self.settings.limits, self._receiver.profiles)
        intake.take(frame)
        if intake.manifest is None:
            raise RemoteProtocolError("frame 0: expected a manifest")
        return intake

    def _keep(self, incoming: Incoming, held: Held) -> None:
        """Complete: the cache moves into the store, and the transfer's place is free."""
        caller = incoming.caller
        self._store.release(incoming.reserved_bytes, incoming.whose)
        incoming.reserved_bytes = 0
        incoming.receipt = receipt = held.receipt
        _, until = self._shelf.get(incoming.cache_id, (b"", time.time() + self.settings.cache_lifetime_s))
        incoming.cache_id = self._store.put(
            held,
            held.nbytes,
            max(until - time.time(), 1e-3),
            whose=incoming.whose,
            key=incoming.cache_id,
        )
        incoming.intake.release()  # the store's bound and lifetime decide from here on
        if self._staging is not None and incoming.cache_id not in self._shelf:
            for earlier in [name for name, (key, _) in self._shelf.items() if key == incoming.key]:
                del self._shelf[earlier]  # its file made room, and the transfer has come again
            self._shelf[incoming.cache_id] = (incoming.key, until)
            notes = {**_whose(caller), "cache_id": incoming.cache_id, "expires_at": until}
            try:
                self._staging.note(incoming.key, notes)
            except OSError as error:  # it is held all the same
                log.warning(
                    "a cache will not outlive a restart: %s", error.strerror, extra=log_fields(incoming)
                )
        if self._staging is not None:
            self._staging.rest(incoming.key)
        self.end(incoming, "complete")
        told = {**log_fields(incoming), "receipt": receipt.to_dict()}
        log.info("transfer complete: %d bytes, %s", receipt.wire_bytes, receipt.recipe, extra=told)
        self._observer.cost("received_bytes", receipt)

    def end(self, incoming: Incoming, state: PushState, why: str = "") -> None:
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
        self._observer.count("transfers", "Transfers by their end", state=state)
        if state != "complete":
            log.info("transfer %s: %s", state, why, extra=log_fields(incoming))
            self._let_go(incoming)
            if self._staging is not None:
                self._staging.forget(incoming.key)

    def drop(self, incoming: Incoming) -> None:
        """Forget a transfer that brought nothing but its manifest: its place is free, its id can begin anew."""
        if not incoming.begun and incoming.state == "accepted":
            self.end(incoming, "failed", "nothing came after its manifest")
            del self._ended[incoming.key]

    def _let_go(self, incoming: Incoming) -> None:
        """Free a transfer's memory and place."""
        self._store.release(incoming.reserved_bytes, incoming.whose)
        incoming.reserved_bytes = 0
        incoming.ticket.leave()
        incoming.intake.release()
        if self._staging is not None:
            self._staging.rest(incoming.key)
        self._incoming.pop(incoming.key, None)

    def sweep(self) -> None:
        """End what is over: transfers that nobody resumes or past their deadline, caches on disk."""
        now, told, held = time.monotonic(), self.settings, self._store.ids()
        for incoming in list(self._incoming.values()):
            quiet = incoming.touched_at < now - told.resume_lifetime_s
            if incoming.cache_id:
                if quiet or incoming.cache_id not in held:
                    del self._incoming[incoming.key]
            elif incoming.lock.locked():
                continue  # at work: the next sweep will see
            elif incoming.began_at < now - told.transfer_deadline_s:
                self.end(incoming, "failed", f"not complete within {told.transfer_deadline_s:g} s")
            elif quiet and not incoming.streams:
                self.end(incoming, "failed", f"broken, and not resumed within {told.resume_lifetime_s:g} s")
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

    async def recall_cache(self, cache_id: str) -> None:
        """Bring a cache that is on disk only back into memory; any other id is left alone."""
        key, _ = self._shelf.get(cache_id, (b"", 0.0))
        if not key or self._staging is None or cache_id in self._store:
            return
        notes, manifest_frame = self._staging.notes(key), self._staging.first_frame(key)
        if manifest_frame:
            owner = _noted(notes)
            incoming = await self.admit(manifest_frame, object(), owner)
            async with incoming.lock:  # another question may be bringing it back already
                pass

    def status(self, incoming: Incoming, state: PushState | None = None) -> PushStatus:
        return PushStatus(
            state or incoming.state,
            incoming.intake.session.next_sequence,
            incoming.cache_id,
            incoming.receipt,
            incoming.why,
        )

    def find(self, transfer_id: bytes, caller: Caller) -> PushStatus:
        """Where a transfer of this peer stands. Raises NotFoundError."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.caller.name == caller.name:
            return self.status(incoming)
        ended = self._ended.get(transfer_id)
        if ended is not None and ended[0] != "complete" and ended[1] == caller.name:
            return PushStatus(ended[0], 0, why=ended[2])
        raise NotFoundError("no transfer with this id: never here or expired")

    async def cancel(self, transfer_id: bytes, caller: Caller) -> None:
        """Give up a transfer that is on its way; what is complete stays. Unknown ids are fine."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.caller.name == caller.name:
            async with incoming.lock:
                self.end(incoming, "cancelled", "given up by the sender")

    def forget_cache(self, cache_id: str, caller: Caller) -> None:
        """Remove a cache, in memory and on disk.

        Raises NotFoundError where it is none of this peer's business, AccessError where it may only read.
        """
        key, _ = self._shelf.get(cache_id, (b"", 0.0))
        if key and cache_id not in self._store:
            notes = self._staging.notes(key) if self._staging else {}
            self._store.check_removable(Whose.left_by(_noted(notes)), caller.name)
        else:
            self._store.delete(cache_id, caller.name)
        if key:
            self._unshelve(cache_id, key)


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


def log_fields(incoming: Incoming) -> dict[str, Any]:
    """What every log line of a transfer says beside its message."""
    return {"transfer": incoming.key.hex(), "peer": incoming.caller.name}
