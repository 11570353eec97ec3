"""Packed transfers that have a name: what was packed once is not packed again.

A caller that names its delivery can ask for it once more, over a new connection or from a new life of
the sender, and gets the same frames. Kept for a while in memory, and on disk where there is staging.

Does not know: sockets, what a request says (only whether it is the same one). Place on the path:
between packing and pushing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from kvlink.agent.sender import Transfer
from kvlink.agent.shares import Account, Movable, Shares
from kvlink.agent.staging import Staging
from kvlink.agent.threads import finished, to_thread
from kvlink.errors import AccessError, BusyError, KvlinkError, LimitError, RemoteProtocolError
from kvlink.receipt import Receipt
from kvlink.transport.api import Caller
from kvlink.wire.messages import TRANSFER_ID_BYTES
from kvlink.wire.session import ReceiveSession

log = logging.getLogger("kvlink.sender")


@dataclass(slots=True)
class Packed:
    """A named transfer. `request`: digest of what was asked for. `account`: against whose share it counts.
    `transfer`: once it is packed."""

    owner: str
    request: str
    account: Account = field(default_factory=Account)
    transfer: Transfer | None = None
    receiver: str = ""
    busy: int = 0
    touched_at: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.transfer.frames)) if self.transfer else 0


class Outbox:
    """Packed transfers by id, each for `lifetime_s` after its last use, at most `max_bytes` in memory,
    `max_peer_bytes` of them for one peer (0: half).

    Where there is no more room some that nobody uses go, whose is `shares`' business; with `staging` they
    stay on disk.
    """

    def __init__(
        self, lifetime_s: float, max_bytes: int, staging: Staging | None = None, *, max_peer_bytes: int = 0
    ) -> None:
        self.lifetime_s = lifetime_s
        self._shares = Shares("packed transfer", max_bytes, max_peer_bytes)
        self._staging = staging
        self._packed: dict[bytes, Packed] = {}
        self._known = {key: time.monotonic() for key in staging or ()}

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def held_bytes(self) -> int:
        """Bytes of frames in memory."""
        return sum(packed.nbytes for packed in self._packed.values())

    async def get(
        self, key: bytes, caller: Caller, request: str, pack: Callable[[], Awaitable[Transfer]]
    ) -> Packed:
        """The transfer of that name, packed by `pack()` if it is the first time. Counts as in use.

        Raises RemoteProtocolError (another request under the same name), AccessError (another peer's),
        LimitError (larger than what one peer may have here), BusyError (no room now).
        """
        if len(key) != TRANSFER_ID_BYTES:
            raise RemoteProtocolError(f"a transfer's id has {TRANSFER_ID_BYTES} bytes, got {len(key)}")
        packed, recalled = self._packed.get(key), None
        if packed is None:
            found, recalled = await to_thread(self._from_disk, key) or (Packed(caller.name, request), None)
            packed = self._packed.get(key) or replace(found, account=Account(caller.account))
        if packed.owner != caller.name:
            raise AccessError("this id is taken")
        if packed.request != request:
            raise RemoteProtocolError(
                "this id belongs to another request; a new request needs an id of its own"
            )
        self._packed[key] = packed
        packed.busy += 1
        try:
            async with packed.lock:
                if packed.transfer is None:
                    # To the end even when cancelled: whoever lost its connection will ask again.
                    await finished(self._fill(key, packed, pack, recalled))
        except BaseException:
            self.leave(packed)
            if packed.transfer is None and not packed.busy:
                self._packed.pop(key, None)
            raise
        return packed

    async def _fill(
        self, key: bytes, packed: Packed, pack: Callable[[], Awaitable[Transfer]], recalled: Transfer | None
    ) -> None:
        transfer = recalled or await pack()
        self._make_room(sum(map(len, transfer.frames)), packed.account)
        packed.transfer = transfer
        if recalled is None:
            await to_thread(self._keep, key, packed)

    def leave(self, packed: Packed) -> None:
        """The counterpart of `get`."""
        packed.busy -= 1
        packed.touched_at = time.monotonic()

    def peek(self, key: bytes, owner: str) -> Packed | None:
        """The transfer of that name if it is here and `owner`'s."""
        packed = self._packed.get(key)
        if packed is None and (found := self._from_disk(key)) is not None:
            packed = found[0]
        return packed if packed is not None and packed.owner == owner else None

    def forget(self, key: bytes) -> None:
        """Drop a transfer, on disk too."""
        self._packed.pop(key, None)
        self._known.pop(key, None)
        if self._staging is not None:
            self._staging.forget(key)

    def sweep(self) -> None:
        """Drop what nobody has asked for again within the lifetime."""
        oldest = time.monotonic() - self.lifetime_s
        for key, packed in list(self._packed.items()):
            if not packed.busy and packed.touched_at < oldest:
                self.forget(key)
        for key, at in list(self._known.items()):
            if at < oldest and key not in self._packed:
                self.forget(key)

    def _make_room(self, nbytes: int, account: Account) -> None:
        """Raises LimitError, and BusyError where what others have a right to fills the bound."""
        taken, movable = Counter[Account](), []
        for key, packed in self._packed.items():
            taken[packed.account] += packed.nbytes
            if packed.transfer is not None and not packed.busy:
                movable.append(Movable(key.hex(), packed.account, packed.nbytes, packed.touched_at))
        going = self._shares.make_room(nbytes, account, movable, taken)
        if going is None:
            raise BusyError(
                f"{nbytes} bytes to send: at most {self._shares.max_bytes} are packed at a time, "
                f"{self._shares.max_peer_bytes} for one peer; try again later", 2.0,
            )  # fmt: skip
        for name in going:
            del self._packed[bytes.fromhex(name)]

    def _keep(self, key: bytes, packed: Packed) -> None:
        if self._staging is None or packed.transfer is None:
            return
        told = packed.transfer.receipt.to_dict()
        notes = {"owner": packed.owner, "request": packed.request, "receipt": told}
        try:
            self._staging.keep(key, packed.transfer.frames, notes, packed.account)
            self._known[key] = time.monotonic()
        except (BusyError, LimitError, OSError) as error:
            log.warning("a transfer will not outlive a restart: %s", error, extra={"transfer": key.hex()})

    def _from_disk(self, key: bytes) -> tuple[Packed, Transfer] | None:
        """A transfer that an earlier life of the sender has packed, if all of it is there."""
        if self._staging is None or key not in self._known:
            return None
        notes = self._staging.notes(key)
        found = self._staging.resume(key)
        if found is None:
            return None
        file, frames = found
        file.close()
        self._staging.rest(key)  # its frames are here
        session = ReceiveSession()
        try:
            for frame in frames:
                session.receive(frame)
        except KvlinkError as error:
            log.warning("what was on disk is of no use: %s", error, extra={"transfer": key.hex()})
            return None
        if session.state != "done" or session.manifest is None or "receipt" not in notes:
            return None
        transfer = Transfer(session.manifest, tuple(frames), Receipt.from_dict(notes["receipt"]))
        return Packed(str(notes.get("owner", "")), str(notes.get("request", ""))), transfer
