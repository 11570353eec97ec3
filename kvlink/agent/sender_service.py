"""The sender agent as a service: contexts read and held, caches fetched and delivered.

A delivery that its caller has named can be asked for again and goes on where it broke; one without a
name is given up at both ends when its caller is gone.

Does not know: gRPC. Place on the path: the sender's edge.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

from kvlink._release import RELEASE
from kvlink.agent.admission import Gate
from kvlink.agent.context import Context
from kvlink.agent.handshake import Needed, compare, needed_by, require_room
from kvlink.agent.outbox import Outbound, Outbox
from kvlink.agent.requests import as_text, request_digest, text_id
from kvlink.agent.sender import Sender
from kvlink.agent.settings import SenderSettings, allowed
from kvlink.agent.shares import Whose
from kvlink.agent.staging import Staging
from kvlink.agent.store import Store
from kvlink.agent.threads import to_thread
from kvlink.agent.transfer import Sent, Transfer
from kvlink.codecs import Transform
from kvlink.compress.select import TIERS
from kvlink.defaults import CALL_S
from kvlink.errors import (
    AccessError,
    BusyError,
    ConfigError,
    DeadlineError,
    InputError,
    KvlinkError,
    LimitError,
    NotFoundError,
    RemoteProtocolError,
    TransportError,
)
from kvlink.model.template import Turn
from kvlink.observe import Observer
from kvlink.receipt import Capabilities
from kvlink.recipe import AUTO, Recipe, Target
from kvlink.transport.api import NOBODY, Caller, Delivery, Explanation, Fetch, Progress, Published, PushStatus
from kvlink.transport.link import CONNECT_S, DialReceiver, PushLink
from kvlink.transport.sockets import SocketCount
from kvlink.wire.messages import TRANSFER_ID_BYTES

log = logging.getLogger("kvlink.sender")

CheckRoom = Callable[[int, int, str], None]
"""Told the tokens of a context, the bytes of its cache and its text."""


class SenderService:
    """Handles the calls of `SenderService` in the proto."""

    def __init__(
        self,
        sender: Sender,
        settings: SenderSettings | None = None,
        observer: Observer | None = None,
        dial: DialReceiver | None = None,
    ) -> None:
        """`dial`: links to receivers, for deliveries."""
        self._sender, self._dial_receiver = sender, dial
        self.settings = told = settings or SenderSettings()
        self.observer = observer or Observer("sender")
        self.store: Store[Context] = Store(
            "context", told.max_held_bytes, told.context_lifetime_s,
            max_peer_bytes=told.max_peer_bytes, wipe=Context.wipe,
        )  # fmt: skip
        disk = told.max_staged_bytes, told.max_peer_staged_bytes
        staging = Staging(told.staging, *disk) if told.staging else None
        self.outbox = Outbox(
            told.resume_lifetime_s,
            told.max_packed_bytes,
            staging,
            max_peer_bytes=told.max_peer_packed_bytes,
            added_bytes=sender.added_bytes,
        )
        self._work = Gate(
            "reads", told.max_reads, places_each=told.max_peer_reads,
            waiting=told.max_waiting, wait_s=told.wait_s,
        )  # fmt: skip
        self._telling: set[asyncio.Task[None]] = set()
        self._prefill_tokens_per_s = 0.0
        for name, what, read in (
            ("held_bytes", "Bytes of held contexts", lambda: self.store.held_bytes),
            ("packed_bytes", "Bytes of packed transfers", lambda: self.outbox.held_bytes),
            ("reads_open", "Reads and packings at work", lambda: self._work.inside),
            ("reads_waiting", "Reads and packings that wait", lambda: self._work.queued),
        ):
            self.observer.watch(name, what, read)

    def capabilities(self) -> Capabilities:
        lm = self._sender.lm
        return Capabilities(
            model_name=lm.name,
            fingerprint=lm.fingerprint,
            sketch=lm.sketch,
            dtype=lm.dtype,
            release=RELEASE,
            limits={"max_context_tokens": lm.window, "max_text_bytes": self.settings.max_text_bytes},
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            address=self.settings.advertised_address,
        )

    async def publish(
        self,
        text: str,
        lifetime_s: int,
        turns: list[tuple[str, str]],
        caller: Caller = NOBODY,
        extends: str = "",
    ) -> Published:
        """Read a text and hold it for its publisher and the readers that were named.

        `extends`: a context that the caller may use; `text` goes behind it and is read alone.
        """
        earlier = [Turn(role, content) for role, content in turns]
        self._check_length("the context", text, *(turn.content for turn in earlier))
        if extends and earlier:
            raise InputError("a context that extends another has the earlier turns of that one")
        with await self._work.enter(caller.account), ExitStack() as held:
            if extends:
                context = await self._read_on(extends, text, caller, held)
            else:
                context = await self._read(text, earlier, Whose.left_by(caller), held)
        key = self.store.put(context, context.nbytes, lifetime_s, whose=Whose.left_by(caller))
        lasting = self.store.granted_s(lifetime_s)
        return Published(key, context.cache.tokens, context.cache.nbytes, context.prefill_s, int(lasting))

    def sweep(self) -> None:
        """Forget contexts past their lifetime, and packed transfers that nobody asked for again."""
        self.store.sweep()
        self.outbox.sweep()

    def unpublish(self, context_id: str, caller: Caller = NOBODY) -> None:
        self.store.delete(context_id, caller.name)

    async def fetch_cache(self, fetch: Fetch, caller: Caller = NOBODY) -> AsyncGenerator[bytes, None]:
        """Frames of a published context, reduced for the caller's question, from where it says."""
        began = time.perf_counter()
        key = fetch.transfer_id or secrets.token_bytes(TRANSFER_ID_BYTES)
        if caller.asked_by:  # a receiver redeems a handle for somebody, who must be allowed to use it too
            self.store.get(fetch.context_id, caller.asked_by)
        self._check_length("the question", fetch.question)
        if fetch.next_sequence and await to_thread(self.outbox.peek, key, caller.name) is None:
            raise NotFoundError("the transfer is not here any more; fetch again from frame 0")
        chosen = self._recipe(fetch.recipe, fetch.target)

        @asynccontextmanager
        async def pack() -> AsyncIterator[Transfer]:
            with self.store.lease(fetch.context_id, caller.name) as context:
                async with self._packing(context, fetch, chosen, key, caller, began) as transfer:
                    yield transfer

        held = await self.outbox.get(key, caller, request_digest(replace(fetch, next_sequence=0)), pack)
        number = fetch.next_sequence
        try:
            while (frame := await held.frame(number)) is not None:
                yield frame
                number += 1
            if held.count is not None and fetch.next_sequence > held.count:
                raise InputError(f"frame {fetch.next_sequence} of a transfer of {held.count} frames")
        finally:
            self.outbox.leave(held)

    async def deliver_cache(
        self, delivery: Delivery, caller: Caller = NOBODY
    ) -> AsyncGenerator[Progress, None]:
        """Deliver the cache; where it is late, and that is allowed, the text in its place."""
        began, contexts = time.perf_counter(), _Contexts(self, delivery, caller)
        total = 0
        with contexts.used():
            try:
                async with aclosing(self._delivered(delivery, caller, contexts, began)) as told:
                    async for progress in told:
                        total = progress.total_bytes
                        yield progress
                return
            except DeadlineError as error:
                if not delivery.target.allow_text:
                    raise
                log.info("the text goes in place of the cache: %s", error)
            async with aclosing(self._delivered(as_text(delivery), caller, contexts, began)) as told:
                async for progress in told:
                    size = total or progress.total_bytes  # a caller was told one total
                    yield replace(progress, sent_bytes=size if progress.done else 0, total_bytes=size)

    async def _delivered(
        self, delivery: Delivery, caller: Caller, contexts: _Contexts, began: float
    ) -> AsyncGenerator[Progress, None]:
        """Pack, dial the receiver, compare identities, push; then say what it cost. `began`: when it was asked for."""
        peers, credentials = self.settings.peers, self.settings.credentials
        delivery = replace(delivery, receiver=allowed(delivery.receiver, peers, credentials))
        self._check_length("the question", delivery.question)
        self._check_length("the context", delivery.text)
        recipe = self._recipe(delivery.recipe, delivery.target)
        if delivery.explain and delivery.context_id:
            raise AccessError(
                "only who sends the text is told what was chosen of it; a handle does not show it"
            )
        key = delivery.delivery_id or secrets.token_bytes(TRANSFER_ID_BYTES)
        with self.observer.span("deliver", caller.trace, transfer=key.hex()) as span:
            caller = replace(caller, trace=span.parent)
            async with self._dial(delivery.receiver, caller) as peer:
                there = await peer.capabilities()
            needed = self._needed(recipe, delivery.target)
            compare(self.capabilities(), there, needed)

            def check_room(tokens: int, cache_bytes: int, text: str) -> None:
                require_room(there, needed.sized(tokens, cache_bytes, text, self._sender.chunk_bytes))

            contexts.check = check_room

            @asynccontextmanager
            async def pack() -> AsyncIterator[Transfer]:
                with contexts.used():
                    context = await contexts.get()
                    async with self._packing(context, delivery, recipe, key, caller, began) as transfer:
                        transfer.note({"prefill": contexts.prefill_s})
                        yield transfer

            packed = await self.outbox.get(key, caller, request_digest(delivery), pack)
            packed.receiver = delivery.receiver
            try:
                async with aclosing(self._deliver(packed, delivery, there, contexts, caller)) as told:
                    async for progress in told:
                        span.attributes["wire_bytes"] = progress.receipt.wire_bytes
                        yield progress
            except (asyncio.CancelledError, GeneratorExit):
                if not delivery.delivery_id:
                    self._give_up(key, packed, caller)
                raise
            except TransportError:
                raise  # asked for again it goes on
            except KvlinkError:
                if packed.busy == 1:
                    self.outbox.forget(key)
                raise
            finally:
                self.outbox.leave(packed)
                if not delivery.delivery_id:
                    self.outbox.forget(key)

    async def _deliver(
        self, packed: Outbound, delivery: Delivery, there: Capabilities, contexts: _Contexts, caller: Caller
    ) -> AsyncGenerator[Progress, None]:
        """Push what is packed, as it is packed; then say what it cost."""
        transfer, sent = packed.transfer, Sent(packed.transfer)
        yield Progress(0, transfer.most_bytes)
        await self._send_profile(delivery.receiver, transfer, there, caller)
        status, last = PushStatus("failed", 0), -1
        wire_s, socket_bytes = 0.0, 0
        async with aclosing(self._push(delivery, packed, caller)) as pushed:
            async for item in pushed:
                if isinstance(item, int):
                    last = max(last, item)
                    yield Progress(sent.until(item), transfer.most_bytes)
                else:
                    status, wire_s, socket_bytes = item
        # Of what the receiver says of its time only what it alone can know.
        stages = {name: s for name, s in status.receipt.stage_s.items() if name in ("decode", "read")}
        stages["wire"] = max(0.0, wire_s - packed.waited_s - sum(stages.values()))
        if status.state == "enough":
            cost = transfer.receipt_until(last + 1, status.next_sequence)
        else:
            cost = await packed.packed()
        receipt = replace(cost.with_stages(**stages), socket_bytes=socket_bytes)
        total = transfer.most_bytes
        log.info(
            "transfer delivered, %s: %d bytes, %s", status.state, receipt.wire_bytes, receipt.recipe,
            extra={"transfer": receipt.transfer_id, "receiver": delivery.receiver, "peer": caller.name,
                   "receipt": receipt.to_dict()},
        )  # fmt: skip
        self.observer.count("transfers", "Transfers by their end", state=status.state)
        self.observer.cost("sent_bytes", receipt)
        own, told = "", Explanation()
        context = await contexts.get() if delivery.answer_here or delivery.explain else None
        if context is not None:
            with await self._work.enter(caller.account):
                if delivery.answer_here:
                    own = (await to_thread(self._sender.answer, context, delivery.question)).text
                if delivery.explain:
                    told = await to_thread(
                        self._sender.explain, context, delivery.question, transfer, receipt
                    )
        yield Progress(total, total, True, status.cache_id, own, receipt, told)

    async def cancel_delivery(self, delivery_id: bytes, caller: Caller = NOBODY) -> None:
        """Give up a delivery at both ends. Unknown ids are fine."""
        for key in (delivery_id, text_id(delivery_id)):
            packed = await to_thread(self.outbox.peek, key, caller.name)
            if packed is not None:
                self.outbox.forget(key)
                if packed.receiver:
                    self._give_up(key, packed, caller)

    def _give_up(self, key: bytes, packed: Outbound, caller: Caller) -> None:
        """Tell the receiver, without anybody waiting for it."""

        async def tell() -> None:
            try:
                async with self._dial(packed.receiver, caller) as peer:
                    await peer.cancel(key)
            except KvlinkError as error:
                log.info("the receiver was not told: %s", error, extra={"transfer": key.hex()})

        task = asyncio.get_running_loop().create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _push(
        self, delivery: Delivery, packed: Outbound, caller: Caller
    ) -> AsyncGenerator[int | tuple[PushStatus, float, int], None]:
        """Push frames, again after a cut and from where the receiver is, until it is complete or enough."""
        address = delivery.receiver
        # With a name of its own it may be what an earlier life of this agent has sent.
        fresh = not delivery.delivery_id
        began, failed = time.perf_counter(), 0
        last_s = CALL_S if caller.remaining_s is None else caller.remaining_s
        while True:
            try:
                left_s = last_s - (time.perf_counter() - began)
                # It answered a moment ago: where it refuses now it may be on its way up again.
                async with self._dial(address, caller, CONNECT_S) as peer:
                    before = peer.socket_count()
                    pushing = peer.push(
                        packed, timeout_s=max(left_s, 0.001), asked_by=caller.name, fresh=fresh
                    )
                    fresh = False
                    async with aclosing(pushing) as told:
                        async for item in told:
                            if isinstance(item, int):
                                failed = 0
                                yield item
                            elif item.state in ("complete", "enough"):
                                wire_s = time.perf_counter() - began
                                await asyncio.sleep(0)
                                yield item, wire_s, _counted(before, peer.socket_count())
                                return
                raise RemoteProtocolError(f"{address}: the receiver ended the call before it was complete")
            except (TransportError, BusyError) as error:
                if error is packed.error:  # it is this agent that has no room
                    raise
                if isinstance(error, DeadlineError) and error.reported:  # the transfer's own: it has ended
                    raise
                failed += 1
                pause_s = max(self.settings.retry_pause_s * failed, error.retry_after_s)
                spent = time.perf_counter() - began + pause_s
                if failed >= self.settings.attempts or spent > last_s:
                    raise
                log.warning(
                    "trying again: %s", error, extra={"transfer": packed.transfer.manifest.transfer_id.hex()}
                )
                await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def _packing(
        self,
        context: Context,
        asked: Fetch | Delivery,
        recipe: Recipe,
        key: bytes,
        caller: Caller,
        began: float,
    ) -> AsyncIterator[Transfer]:
        """A transfer whose frames may be made until this is left. `began`: when it was asked for."""
        with (
            await self._work.enter(caller.account),
            self.observer.span("pack", caller.trace, transfer=key.hex()) as span,
        ):
            target = asked.target.after(time.perf_counter() - began)
            found = await to_thread(
                self._sender.pack, context, asked.question, recipe, target, None, key, asked.base_digest
            )
            yield found
            for line in found.receipt.warnings:
                log.warning("%s", line, extra={"transfer": found.receipt.transfer_id})
            span.attributes |= {"recipe": found.receipt.recipe, "wire_bytes": found.receipt.wire_bytes}

    async def _send_profile(
        self, address: str, transfer: Transfer, there: Capabilities, caller: Caller
    ) -> None:
        """Send the profile ahead, once, to a receiver that lacks it."""
        profile, recipe = self._sender.lm.profile, transfer.manifest.recipe
        if profile is None or recipe.codec.calibration is None:
            return
        if profile.digest not in there.profiles:
            async with self._dial(address, caller) as peer:
                await peer.put_profile(profile.to_bytes())
            log.info("profile %s sent to %s", profile.digest.hex()[:12], address)

    def _dial(
        self, address: str, caller: Caller, patience_s: float = 0.0
    ) -> AbstractAsyncContextManager[PushLink]:
        if self._dial_receiver is None:
            raise ConfigError(f"{address}: this sender dials nobody; it can be fetched from")
        return self._dial_receiver(address, caller, patience_s)

    def _needed(self, recipe: Recipe, target: Target) -> Needed:
        """What a transfer by a recipe needs, as far as it is known before its text is cut."""
        needed, profile = needed_by(self._sender.resolved(recipe)), self._sender.lm.profile
        if profile is not None and profile.digest == needed.calibration:
            needed = replace(needed, profile_bytes=profile.file_bytes)
        tiered = target.deadline_s and recipe.mode == "kv"
        return replace(needed, segments=needed.segments + len(TIERS) - 1) if tiered else needed

    def _check_length(self, what: str, *texts: str) -> None:
        """Refuse by its length a text that cannot be read here. Raises LimitError, ContextError."""
        self._sender.lm.require_room(what, *texts)
        size = sum(len(text.encode()) for text in texts)
        if size > self.settings.max_text_bytes:
            raise LimitError(f"at most {self.settings.max_text_bytes} bytes of text, got {size}")

    async def _read(
        self, text: str, turns: list[Turn], whose: Whose, held: ExitStack, check: CheckRoom = lambda *_: None
    ) -> Context:
        """Cut and read a text, with room promised for its tokens and then its cache until `held` is left.

        `check`: told what it will be before it is read.
        """
        texts = (text, *(turn.content for turn in turns))
        reading = self._sender.lm.reading_bytes(*(len(t.encode()) for t in texts))
        held.enter_context(self.store.promised(reading, whose))
        cut = await to_thread(self._sender.cut, text, turns)
        check(len(cut.ids), cut.cache_bytes, text)
        held.enter_context(self.store.promised(cut.cache_bytes, whose))
        context = await to_thread(self._sender.prefill, cut)
        self._prefill_tokens_per_s = context.cache.tokens / max(context.prefill_s, 1e-9)
        return context

    async def _read_on(self, extends: str, text: str, caller: Caller, held: ExitStack) -> Context:
        """A held context with `text` behind, with room promised as in `_read`."""
        whose = Whose.left_by(caller)
        before = held.enter_context(self.store.lease(extends, caller.name))
        reading = self._sender.lm.reading_bytes(len(before.text.encode()) + len(text.encode()))
        held.enter_context(self.store.promised(reading, whose))
        cut = await to_thread(self._sender.continued, before, text)
        held.enter_context(self.store.promised(cut.cache_bytes, whose))
        return await to_thread(self._sender.read_on, before, cut)

    def _recipe(self, text: str, target: Target) -> Recipe:
        """The caller's recipe or the default one. Raises RecipeError, AccessError."""
        recipe = self._sender.recipe(text or self.settings.default_recipe, target)
        if not text and target.needs_step and not isinstance(recipe.codec, Transform):
            recipe = self._sender.recipe(AUTO, target)  # nobody named what cannot meet it
        if recipe.selection.press and not self.settings.presses:
            raise AccessError(f"{recipe.selection.name}: this sender imports no kvpress for its callers")
        return recipe


def _anything(tokens: int, cache_bytes: int, text: str) -> None:
    """Nobody has said yet what there is room for."""


class _Contexts:
    """The context of one delivery, read or leased when it is first needed, kept while anybody uses it."""

    def __init__(self, service: SenderService, delivery: Delivery, caller: Caller) -> None:
        self._service, self._delivery, self._caller = service, delivery, caller
        self.check: CheckRoom = _anything
        """Raises where the receiver has no room for what is told, before it is read."""
        self._held, self._users = ExitStack(), 0
        self._found: Context | None = None
        self.prefill_s = 0.0

    @contextmanager
    def used(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._found = None
                self._held.close()

    async def get(self) -> Context:
        if self._found is None:
            told, service = self._delivery, self._service
            if told.context_id:
                found = self._held.enter_context(service.store.lease(told.context_id, self._caller.name))
                self.check(found.cache.tokens, found.cache.shape.cache_bytes, found.text)
                self._found = found
            else:
                with await service._work.enter(self._caller.account):
                    whose = Whose.left_by(self._caller)
                    self._found = await service._read(told.text, [], whose, self._held, self.check)
                self._held.callback(self._found.wipe)
                self.prefill_s = self._found.prefill_s
        return self._found


def _counted(before: SocketCount | None, after: SocketCount | None) -> int:
    """Bytes that the kernel saw acknowledged for one transfer; 0 where it cannot be told."""
    return after.since(before).bytes_acked if before and after else 0
