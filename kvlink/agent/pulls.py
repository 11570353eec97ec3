"""Handles that a receiver redeems itself: a caller names a context that a sender holds, and asks.

    handle + question ─▶ held already? ─▶ pull what is missing ─▶ the id of a cache to answer from

What is pulled belongs to the caller for whom it was pulled: the sender checks that both the receiver and the
caller may use the context, and nobody else's pull is shared. Callers with the same question wait for one pull; a
later question moves what is missing only.

Does not know: gRPC, how a transfer is taken or answered from. Place on the path: in front of the receiver's
inbound transfers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from blake3 import blake3

from kvlink.agent.handshake import needed_by, require_same, require_spoken
from kvlink.agent.receiver import Held
from kvlink.agent.settings import ReceiverSettings, allowed
from kvlink.agent.store import Store
from kvlink.errors import ConfigError, DeadlineError, NotFoundError, RemoteProtocolError
from kvlink.receipt import Capabilities
from kvlink.recipe import Recipe, Target
from kvlink.transport.api import Ask, Caller, Fetch, PushStatus
from kvlink.transport.handle import Handle
from kvlink.transport.link import DialSender

_KNOWN = 1024
"""Handles that are remembered."""
_QUESTIONS = 256
"""Questions of a handle that are remembered to be answered from what is there."""


Take = Callable[[AsyncIterator[bytes], Caller], AsyncGenerator[PushStatus, None]]
"""Takes a transfer."""


@dataclass(slots=True)
class _Pulled:
    """What of a handle is here, for one caller."""

    cache_id: str = ""
    questions: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Digests: a question may be as long as the model's window."""
    serves_all: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pulls:
    """The handles that were redeemed here. For one event loop."""

    def __init__(
        self,
        settings: ReceiverSettings,
        store: Store[Held],
        take: Take,
        dial: DialSender | None,
        own: Callable[[], Capabilities],
    ) -> None:
        """`own`: what this receiver says of itself, to compare a sender with."""
        self._own = own
        self._settings, self._store, self._take, self._dial = settings, store, take, dial
        self._known: OrderedDict[tuple[str, ...], _Pulled] = OrderedDict()

    async def cache_id(self, ask: Ask, caller: Caller) -> str:
        """A cache to answer `ask` from, pulled if it is not here.

        Raises ConfigError (no handle, or this receiver dials nobody), AccessError (an address that it may not
        dial), and what the sender and the transfer raise.
        """
        handle = Handle.parse(ask.handle)
        if self._dial is None:
            raise ConfigError("this receiver redeems no handles")
        address = allowed(handle.address, self._settings.peers, self._settings.credentials)
        recipe = ask.recipe or self._settings.default_recipe
        key = (caller.name, caller.host, f"kvlink://{address}/{handle.context_id}", recipe, str(ask.target))
        pulled = self._known.setdefault(key, _Pulled())
        self._known.move_to_end(key)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        async with pulled.lock:
            if pulled.cache_id not in self._store:
                pulled.cache_id, pulled.serves_all, pulled.questions = "", False, OrderedDict()
            if not (pulled.serves_all or _digest(ask.question) in pulled.questions):
                fetch = Fetch(handle.context_id, ask.question, recipe, ask.target)
                await self._pull(pulled, address, fetch, caller)
            return pulled.cache_id

    async def _pull(self, pulled: _Pulled, address: str, fetch: Fetch, caller: Caller) -> None:
        """Pull what `pulled` lacks for the question of `fetch`."""
        base = b""
        if pulled.cache_id:
            base = bytes.fromhex(self._store.get(pulled.cache_id, caller.name).receipt.cache_digest)
        try:
            done = await self._transfer(address, replace(fetch, base_digest=base), caller)
        except NotFoundError:
            if not base or pulled.cache_id in self._store:
                raise
            done = await self._transfer(address, fetch, caller)  # the base has gone meanwhile
        except DeadlineError:
            if not fetch.target.allow_text:
                raise
            done = await self._transfer(address, replace(fetch, recipe="text", target=Target()), caller)
        taken = Recipe.parse(done.receipt.recipe)
        pulled.cache_id = done.cache_id
        pulled.serves_all = done.state == "complete" and not taken.prunes and taken.background is None
        pulled.questions[_digest(fetch.question)] = None
        while len(pulled.questions) > _QUESTIONS:
            pulled.questions.popitem(last=False)

    async def _transfer(self, address: str, fetch: Fetch, caller: Caller) -> PushStatus:
        if self._dial is None:
            raise ConfigError("this receiver redeems no handles")
        owner = replace(caller, readers=(), asked_by="")
        async with self._dial(address, caller) as source:
            here, there, needed = self._own(), await source.capabilities(), needed_by(fetch.recipe)
            require_spoken(here.spoken, there.spoken, needed)
            require_same(here, there, needed)
            async with (
                aclosing(source.fetch(fetch, caller.name, early=False)) as frames,
                aclosing(self._take(frames, owner)) as statuses,
            ):
                async for status in statuses:
                    if status.cache_id:
                        return status
        raise RemoteProtocolError(f"{address}: the transfer of {fetch.context_id} came to no end")


def _digest(question: str) -> bytes:
    return blake3(question.encode()).digest(length=16)
