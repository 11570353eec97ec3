"""The sender agent as a service: contexts read and held, caches fetched and delivered.

Does not know: gRPC. Place on the path: the sender's edge.
"""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from kvlink._release import RELEASE
from kvlink.agent.sender import DEFAULT_RECIPE, Context, Sender, Transfer
from kvlink.agent.store import Store
from kvlink.errors import AccessError, IdentityError, LimitError, RemoteProtocolError, TransportError
from kvlink.model.template import Turn
from kvlink.receipt import Capabilities
from kvlink.recipe import PRESS, Recipe, Wish
from kvlink.transport.api import Delivery, Explanation, Progress, Published, PushStatus
from kvlink.transport.client import ReceiverClient
from kvlink.transport.sockets import SocketCount

log = logging.getLogger("kvlink.sender")

LOOPBACK_PEERS = ("127.0.0.1:*", "localhost:*", "[[]::1]:*")


@dataclass(frozen=True, slots=True)
class SenderSettings:
    """Bounds of a sender agent. `peers`: receivers that may be dialled, as host:port patterns.

    `presses`: whether a caller's recipe may name a class of kvpress, which imports that package.
    """

    max_held_bytes: int = 8_000_000_000
    context_lifetime_s: float = 3600.0
    max_text_bytes: int = 16_000_000
    peers: tuple[str, ...] = LOOPBACK_PEERS
    default_recipe: str = DEFAULT_RECIPE
    presses: bool = False
    attempts: int = 3
    retry_pause_s: float = 0.5


class SenderService:
    """Handles the calls of `SenderService` in the proto."""

    def __init__(self, sender: Sender, settings: SenderSettings | None = None) -> None:
        self._sender = sender
        self.settings = settings or SenderSettings()
        self.store: Store[Context] = Store(
            "context", self.settings.max_held_bytes, self.settings.context_lifetime_s
        )
        self._prefill_tokens_per_s = 0.0

    def capabilities(self) -> Capabilities:
        lm = self._sender.lm
        return Capabilities(
            model_name=lm.name,
            fingerprint=lm.fingerprint,
            dtype=lm.dtype,
            release=RELEASE,
            limits={"max_context_tokens": lm.window, "max_text_bytes": self.settings.max_text_bytes},
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )

    async def publish(self, text: str, lifetime_s: int, turns: list[tuple[str, str]]) -> Published:
        context = await self._read(text, [Turn(role, content) for role, content in turns])
        key = self.store.put(context, context.nbytes, lifetime_s)
        lasting = self.store.granted_s(lifetime_s)
        return Published(key, context.cache.tokens, context.cache.nbytes, context.prefill_s, int(lasting))

    def sweep(self) -> None:
        """Forget contexts past their lifetime."""
        self.store.sweep()

    def unpublish(self, context_id: str) -> None:
        self.store.delete(context_id)

    async def fetch_cache(
        self,
        context_id: str,
        question: str,
        recipe: str,
        wish: Wish,
        transfer_id: bytes,
        next_sequence: int,
    ) -> AsyncIterator[bytes]:
        """Frames of a published context, reduced for the caller's question."""
        if transfer_id or next_sequence:
            raise RemoteProtocolError("resuming a fetch is not in this release; fetch again from frame 0")
        context = self.store.get(context_id)
        chosen = self._recipe(recipe)
        transfer = await asyncio.to_thread(self._sender.pack, context, question, chosen, wish)
        for frame in transfer.frames:
            yield frame

    async def deliver_cache(self, delivery: Delivery) -> AsyncIterator[Progress]:
        """Pack, dial the receiver, compare identities, push; then say what it cost."""
        self._allow(delivery.receiver)
        recipe = self._recipe(delivery.recipe)
        if delivery.explain and delivery.context_id:
            raise AccessError(
                "only who sends the text is told what was chosen of it; a handle does not show it"
            )
        async with ReceiverClient(delivery.receiver) as peer:
            there = await self._compare(peer, recipe)
        context, prefill_s = await self._context(delivery)
        transfer = await asyncio.to_thread(
            self._sender.pack, context, delivery.question, recipe, delivery.wish
        )
        sent = list(itertools.accumulate(len(frame) for frame in transfer.frames))
        total = sent[-1]
        yield Progress(0, total)
        await self._send_profile(delivery.receiver, transfer, there)
        status = PushStatus("failed", 0)
        wire_s, socket_bytes = 0.0, 0
        async for item in self._push(delivery.receiver, transfer):
            if isinstance(item, int):
                yield Progress(sent[item], total)
            else:
                status, wire_s, socket_bytes = item
        rest_s = sum(status.receipt.stage_s.values())  # decode or read, at the receiver
        stages = {**status.receipt.stage_s, "wire": max(0.0, wire_s - rest_s), "prefill": prefill_s}
        receipt = replace(transfer.receipt.with_stages(**stages), socket_bytes=socket_bytes)
        log.info("transfer %s delivered to %s: %s", receipt.transfer_id, delivery.receiver, receipt)
        own = ""
        if delivery.answer_here:
            own = (await asyncio.to_thread(self._sender.answer, context, delivery.question)).text
        told = Explanation()
        if delivery.explain:
            told = await asyncio.to_thread(self._sender.explain, context, delivery.question, transfer)
        yield Progress(total, total, True, status.cache_id, own, receipt, told)

    async def _push(
        self, address: str, transfer: Transfer
    ) -> AsyncIterator[int | tuple[PushStatus, float, int]]:
        """Push frames, again after a cut and from where the receiver is, until it is complete."""
        began = time.perf_counter()
        for attempt in range(1, self.settings.attempts + 1):
            try:
                async with ReceiverClient(address) as peer:
                    before = peer.socket_count()
                    async for item in peer.push(transfer.frames):
                        if isinstance(item, int):
                            yield item
                        elif item.state == "complete":
                            wire_s = time.perf_counter() - began
                            await asyncio.sleep(0)
                            after = peer.socket_count()
                            yield item, wire_s, _counted(before, after)
                            return
                raise RemoteProtocolError(f"{address}: the receiver ended the call before it was complete")
            except TransportError as error:
                if attempt == self.settings.attempts:
                    raise
                log.warning("transfer %s: %s; trying again", transfer.receipt.transfer_id, error)
                await asyncio.sleep(self.settings.retry_pause_s * attempt)

    async def _send_profile(self, address: str, transfer: Transfer, there: Capabilities) -> None:
        """Send the profile ahead, once, to a receiver that lacks it."""
        profile, recipe = self._sender.lm.profile, transfer.manifest.recipe
        if profile is None or recipe.transform is None or recipe.basis == "own":
            return
        if profile.digest not in there.profiles:
            async with ReceiverClient(address) as peer:
                await peer.put_profile(profile.to_bytes())
            log.info("profile %s sent to %s", profile.digest.hex()[:12], address)

    async def _compare(self, peer: ReceiverClient, recipe: Recipe) -> Capabilities:
        """Identity before bytes: nothing is read or packed for a receiver that cannot use it."""
        there = await peer.capabilities()
        self._sender.lm.fingerprint.require_match(there.fingerprint, recipe.mode)
        if recipe.mode == "kv" and there.dtype != self._sender.lm.dtype:
            raise IdentityError(f"dtype: here {self._sender.lm.dtype}, at the peer {there.dtype}")
        return there

    async def _context(self, delivery: Delivery) -> tuple[Context, float]:
        """The published context, or the text read now with the seconds that it took."""
        if delivery.context_id:
            return self.store.get(delivery.context_id), 0.0
        context = await self._read(delivery.text)
        return context, context.prefill_s

    async def _read(self, text: str, turns: list[Turn] | None = None) -> Context:
        size = len(text.encode())
        if size > self.settings.max_text_bytes:
            raise LimitError(f"at most {self.settings.max_text_bytes} bytes of text, got {size}")
        context = await asyncio.to_thread(self._sender.read, text, turns or [])
        self._prefill_tokens_per_s = context.cache.tokens / max(context.prefill_s, 1e-9)
        return context

    def _recipe(self, text: str) -> Recipe:
        """The caller's recipe or the default one. Raises RecipeError, AccessError."""
        recipe = self._sender.recipe(text or self.settings.default_recipe)
        if recipe.selection.method.startswith(PRESS) and not self.settings.presses:
            raise AccessError(f"{recipe.selection.method}: this sender imports no kvpress for its callers")
        return recipe

    def _allow(self, address: str) -> None:
        """Nobody dials an address that the peer list does not allow."""
        if not any(fnmatch.fnmatchcase(address, pattern) for pattern in self.settings.peers):
            raise AccessError(
                f"{address!r} is not in this sender's peer list ({', '.join(self.settings.peers)}); add it with --peer"
            )


def _counted(before: SocketCount | None, after: SocketCount | None) -> int:
    """Bytes that the kernel saw acknowledged for one transfer; 0 where it cannot be told."""
    return after.since(before).bytes_acked if before and after else 0
