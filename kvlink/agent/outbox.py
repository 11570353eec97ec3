"""Transfers on their way out that have a name: what was packed once is not packed again.

A transfer is packed by a task of its own, whoever asked for it: its frames can be sent while later ones
are still to be made. A caller that names its delivery can ask for it once more, over a new connection or
from a new life of the sender, and gets the same frames. Kept for a while in memory, and on disk where
there is staging.

Does not know: sockets, what a request says (only whether it is the same one). Place on the path:
between packing and pushing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace

from kvlink.agent.shares import Account, Movable, Shares
from kvlink.agent.staging import Staged, Staging
from kvlink.agent.threads import stream, to_thread
from kvlink.agent.transfer import Transfer
from kvlink.errors import AccessError, BusyError, KvlinkError, LimitError, NotFoundError, RemoteProtocolError
from kvlink.receipt import Receipt
from kvlink.transport.api import Caller
from kvlink.transport.link import AddedBytes, added_by_nothing
from kvlink.wire.messages import TRANSFER_ID_BYTES
from kvlink.wire.session import ReceiveSession

log = logging.getLogger("kvlink.sender")

_STAGED_BYTES = 1_000_000
"""Frames are written to the disk in pieces of about this size, and at the end."""

Pack = Callable[[], AbstractAsyncContextManager[Transfer]]
"""Gives a transfer that may be read until the context is left."""


@dataclass(slots=True, eq=False)
class Outbound:
    """A named transfer. `request`: digest of what was asked for. `account`: against whose share it counts.
    `busy`: callers that use it."""

    owner: str
    request: str
    account: Account = field(default_factory=Account)
    receiver: str = ""
    busy: int = 0
    nbytes: int = 0
    waited_s: float = 0.0
    """Seconds that readers have waited for frames to be made."""
    touched_at: float = field(default_factory=time.monotonic)
    found: Transfer | None = None
    error: Exception | None = None
    packing: asyncio.Task[None] | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def transfer(self) -> Transfer:
        """What is sent. Raises NotFoundError before it is planned: `Outbox.get` waits for that."""
        if self.found is None:
            raise NotFoundError("the transfer is not here any more")
        return self.found

    @property
    def count(self) -> int | None:
        """Frames, once all are packed."""
        return self.transfer.count

    async def frame(self, number: int) -> bytes | None:
        """Frame `number` as soon as it is made, None behind the last one. Raises what ended the packing."""
        if (frame := self.transfer.made(number)) is not None:
            return frame
        began = time.perf_counter()
        async with self.changed:
            while self.transfer.made(number) is None and not self.transfer.is_packed:
                self._require_alive()
                await self.changed.wait()
        self.waited_s += time.perf_counter() - began
        return self.transfer.made(number)

    async def packed(self) -> Receipt:
        """The receipt, once every frame is made. Raises what ended the packing."""
        async with self.changed:
            while not self.transfer.is_packed or self.packing is not None:
                self._require_alive()
                await self.changed.wait()
        return self.transfer.receipt

    async def tell(self) -> None:
        """Wake whoever waits."""
        async with self.changed:
            self.changed.notify_all()

    def _require_alive(self) -> None:
        if self.error is not None:
            raise self.error
        if self.packing is None:
            raise NotFoundError("the transfer was given up while it was packed")


class Outbox:
    """Outbound transfers by id, each for `lifetime_s` after its last use, at most `max_bytes` in memory,
    `max_peer_bytes` of them for one peer (0: half).

    Where there is no more room some that nobody uses go, whose is `shares`' business; with `staging` they
    stay on disk.
    """

    def __init__(
        self,
        lifetime_s: float,
        max_bytes: int,
        staging: Staging | None = None,
        *,
        max_peer_bytes: int = 0,
        added_bytes: AddedBytes = added_by_nothing,
    ) -> None:
        self.lifetime_s, self._added_bytes = lifetime_s, added_bytes
        self._shares = Shares("packed transfer", max_bytes, max_peer_bytes)
        self._staging = staging
        self._held: dict[bytes, Outbound] = {}
        self._known = {key: time.monotonic() for key in staging or ()}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """Bytes of frames in memory."""
        return sum(held.nbytes for held in self._held.values())

    async def get(self, key: bytes, caller: Caller, request: str, pack: Pack) -> Outbound:
        """The transfer of that name, packed by `pack()` if it is the first time. Counts as in use. Returns
        when it is planned; its frames may still be on their way.

        Raises RemoteProtocolError (another request under the same name), AccessError (another peer's),
        LimitError (larger than what one peer may have here), BusyError (no room now), and what `pack` raises.
        """
        if len(key) != TRANSFER_ID_BYTES:
            raise RemoteProtocolError(f"a transfer's id has {TRANSFER_ID_BYTES} bytes, got {len(key)}")
        held, kept = self._held.get(key), list[bytes]()
        if held is None:
            recalled = await to_thread(self._from_disk, key)
            found, kept = recalled if recalled else (Outbound(caller.name, request), [])
            held = self._held.get(key) or replace(found, account=Account(caller.account))
        if held.owner != caller.name:
            raise AccessError("this id is taken")
        if held.request != request:
            raise RemoteProtocolError(
                "this id belongs to another request; a new request needs an id of its own"
            )
        self._held[key] = held
        held.busy += 1
        try:
            if held.found is None and held.packing is None:
                held.packing = asyncio.create_task(self._pack(key, held, pack, kept))
            elif held.packing is None:
                self._grow(held, held.transfer.most_bytes - held.nbytes)
            async with held.changed:
                while held.found is None:
                    held._require_alive()
                    await held.changed.wait()
        except BaseException:
            self.leave(held)
            if not held.busy and not held.nbytes and held.packing is None:
                self._drop(key, held)
            raise
        return held

    async def _pack(self, key: bytes, held: Outbound, pack: Pack, kept: list[bytes]) -> None:
        """Pack to the end, even when whoever asked is gone: who has lost its connection will ask again."""
        try:
            async with pack() as transfer:
                self._grow(held, transfer.most_bytes)  # before any frame leaves
                held.found = transfer
                await held.tell()
                async with aclosing(stream(lambda: self._make(key, held, transfer, kept))) as made:
                    async for _ in made:
                        await held.tell()
                held.nbytes = transfer.most_bytes
        except Exception as error:  # belongs to whoever waits for a frame
            held.error = error
            self._drop(key, held)
        except BaseException:
            self._drop(key, held)
            raise
        finally:
            held.packing = None
            held.touched_at = time.monotonic()
            await held.tell()

    def _make(self, key: bytes, held: Outbound, transfer: Transfer, kept: list[bytes]) -> Iterator[None]:
        """Make one frame after another, in a thread, and put them on disk as they are made.

        `kept`: the first frames, from an earlier life that came to no end; the receiver may have them.
        """
        staged, unsaved = self._begin(key, held), list[bytes]()
        try:
            for number, frame in enumerate(transfer):
                if number < len(kept) and frame != kept[number]:
                    raise RemoteProtocolError(
                        f"frame {number} is not what an earlier life of this sender has made of the same request; "
                        "a new attempt needs an id of its own"
                    )
                unsaved.append(frame)
                if staged and sum(map(len, unsaved)) >= _STAGED_BYTES:
                    staged, unsaved = self._add(key, staged, unsaved), []
                yield
            if staged and (staged := self._add(key, staged, unsaved)):
                self._close(key, held, staged, transfer.receipt)
        finally:
            if staged:
                staged.close()

    def leave(self, held: Outbound) -> None:
        """The counterpart of `get`."""
        held.busy -= 1
        held.touched_at = time.monotonic()

    def peek(self, key: bytes, owner: str) -> Outbound | None:
        """The transfer of that name if it is here and `owner`'s."""
        held = self._held.get(key)
        if held is None and (found := self._from_disk(key)) is not None:
            held = found[0]
        return held if held is not None and held.owner == owner else None

    def forget(self, key: bytes) -> None:
        """Drop a transfer, on disk too; its packing ends at its next frame."""
        held = self._held.get(key)
        if held is not None:
            self._drop(key, held)
            if held.packing is not None:
                held.packing.cancel()
        self._known.pop(key, None)
        if self._staging is not None:
            self._staging.forget(key)

    def sweep(self) -> None:
        """Drop what nobody has asked for again within the lifetime."""
        oldest = time.monotonic() - self.lifetime_s
        for key, held in list(self._held.items()):
            if not held.busy and held.packing is None and held.touched_at < oldest:
                self.forget(key)
        for key, at in list(self._known.items()):
            if at < oldest and key not in self._held:
                self.forget(key)

    def _drop(self, key: bytes, held: Outbound) -> None:
        if self._held.get(key) is held:
            del self._held[key]

    def _grow(self, held: Outbound, nbytes: int) -> None:
        """Count more bytes. Raises LimitError, and BusyError where what others have a right to fills the bound."""
        self._shares.check(held.nbytes + nbytes)
        taken, movable = Counter[Account](), []
        for key, other in self._held.items():
            taken[other.account] += other.nbytes
            if other.packing is None and not other.busy:
                movable.append(Movable(key.hex(), other.account, other.nbytes, other.touched_at))
        for name in self._shares.make_room(nbytes, held.account, movable, taken):
            del self._held[bytes.fromhex(name)]
        held.nbytes += nbytes

    def _begin(self, key: bytes, held: Outbound) -> Staged | None:
        """Files for a transfer, where there is a disk and it has room."""
        if self._staging is None:
            return None
        try:
            staged = self._staging.begin(key, {"owner": held.owner, "request": held.request}, held.account)
        except (BusyError, LimitError, OSError) as error:
            _will_not_last(key, error)
            return None
        self._known[key] = time.monotonic()
        return staged

    def _add(self, key: bytes, staged: Staged, frames: list[bytes]) -> Staged | None:
        try:
            staged.add(*frames)
        except (BusyError, LimitError, OSError) as error:
            _will_not_last(key, error)
            staged.close()
            if self._staging is not None:
                self._staging.forget(key)
            return None
        return staged

    def _close(self, key: bytes, held: Outbound, staged: Staged, receipt: Receipt) -> None:
        if self._staging is None:
            return
        notes = {"owner": held.owner, "request": held.request, "receipt": receipt.to_dict()}
        try:
            self._staging.note(key, notes)
        except OSError as error:
            _will_not_last(key, error)
        self._staging.rest(key)

    def _from_disk(self, key: bytes) -> tuple[Outbound, list[bytes]] | None:
        """A transfer that an earlier life of the sender has packed, and what is there of one that it has begun."""
        if self._staging is None or key not in self._known:
            return None
        notes = self._staging.notes(key)
        found = self._staging.resume(key)
        if found is None:
            return None
        file, frames = found
        file.close()
        self._staging.rest(key)  # its frames are here
        session = ReceiveSession(keep=False)
        try:
            for frame in frames:
                session.receive(frame)
        except KvlinkError as error:
            log.warning("what was on disk is of no use: %s", error, extra={"transfer": key.hex()})
            return None
        if session.manifest is None:
            return None
        held = Outbound(str(notes.get("owner", "")), str(notes.get("request", "")))
        if session.state == "done" and "receipt" in notes:
            held.found = Transfer.of_frames(
                session.manifest, frames, Receipt.from_dict(notes["receipt"]), self._added_bytes
            )
        return held, frames


def _will_not_last(key: bytes, error: Exception) -> None:
    """It is sent all the same."""
    log.warning("a transfer will not outlive a restart: %s", error, extra={"transfer": key.hex()})
