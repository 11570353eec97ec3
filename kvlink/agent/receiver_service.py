"""The receiver agent as a service: transfers in, caches held, questions answered.

Does not know: gRPC. Place on the path: the receiver's edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from kvlink._release import RELEASE
from kvlink.agent.admission import Gate
from kvlink.agent.arrivals import Arrivals, Incoming, log_fields
from kvlink.agent.receiver import Held, Receiver
from kvlink.agent.settings import ReceiverSettings
from kvlink.agent.store import Store
from kvlink.agent.threads import stream, to_thread
from kvlink.agent.turns import Turns
from kvlink.defaults import NEW_TOKENS
from kvlink.errors import (
    BusyError,
    ContextError,
    DeadlineError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.generate import Step
from kvlink.observe import Observer
from kvlink.receipt import Capabilities
from kvlink.transport.api import NOBODY, Ask, Caller, Piece, PushStatus

log = logging.getLogger("kvlink.receiver")


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
            max_peer_bytes=told.max_peer_bytes, fresh_s=told.unused_s, wipe=Held.wipe,
        )  # fmt: skip
        self._generations = Gate(
            "generations", told.max_generations, places_each=told.max_peer_generations,
            waiting=told.max_waiting, wait_s=told.wait_s,
        )  # fmt: skip
        self._turns = Turns()
        self.arrivals = Arrivals(receiver, self.store, told, self.observer)
        self._prefill_tokens_per_s = 0.0
        for name, what, read in (
            ("held_bytes", "Bytes of held caches", lambda: self.store.held_bytes),
            ("reserved_bytes", "Bytes promised to transfers", lambda: self.store.reserved_bytes),
            ("transfers_open", "Transfers on their way in", lambda: self.arrivals.gate.inside),
            ("transfers_waiting", "Transfers that wait for a place", lambda: self.arrivals.gate.queued),
            ("generations_open", "Generations at work", lambda: self._generations.inside),
            ("generations_waiting", "Generations that wait", lambda: self._generations.queued),
        ):
            self.observer.watch(name, what, read)

    def capabilities(self) -> Capabilities:
        lm, limits = self._receiver.lm, self.settings.limits
        return Capabilities(
            model_name=lm.name,
            fingerprint=lm.fingerprint,
            sketch=lm.sketch,
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
            address=self.settings.advertised_address,
        )

    async def put_profile(self, data: bytes, caller: Caller = NOBODY) -> bytes:
        """Take a profile that a sender sends ahead of its transfers."""
        return (await asyncio.to_thread(self._receiver.add_profile, data, caller.account)).digest

    async def push_cache(
        self, frames: AsyncIterator[bytes], caller: Caller = NOBODY
    ) -> AsyncGenerator[PushStatus, None]:
        """Take a transfer: accepted, durable as frames are kept, complete. See the proto."""
        me = object()
        self.sweep()
        incoming = await self.arrivals.admit(await self._next(frames), me, caller)
        with self.observer.span("receive", caller.trace, transfer=incoming.key.hex()) as told:
            incoming.streams += 1
            try:
                async with aclosing(self._feed(incoming, frames, me)) as statuses:
                    async for status in statuses:
                        yield status
            except (TruncatedError, BusyError, asyncio.CancelledError, GeneratorExit):
                # Resumable: the sweep ends it if nobody comes. Who leaves after the end has cut nothing.
                if incoming.feeder is me and incoming.state == "accepted":
                    where = incoming.intake.session.next_sequence
                    log.info("transfer cut at frame %d", where, extra=log_fields(incoming))
                    self.arrivals.drop(incoming)
                raise
            except Exception as error:
                if incoming.feeder is me:
                    self.arrivals.end(incoming, "failed", f"{type(error).__name__}: {error}")
                raise
            finally:
                incoming.streams -= 1
                told.attributes |= {"state": incoming.state, "wire_bytes": incoming.receipt.wire_bytes}

    async def _feed(
        self, incoming: Incoming, frames: AsyncIterator[bytes], me: object
    ) -> AsyncGenerator[PushStatus, None]:
        """Take the frames of one stream into a transfer that was admitted."""
        async with incoming.lock:  # what an earlier stream brought last is counted
            await self.arrivals.settle(incoming)
            status = self.arrivals.status(incoming)
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
                durable = await to_thread(self.arrivals.take, incoming, frame)
                incoming.touched_at = time.monotonic()
                await self.arrivals.settle(incoming)
            if durable:
                yield self.arrivals.status(incoming, "durable")
            if incoming.cache_id:
                read_s = incoming.receipt.stage_s.get("read")
                if read_s:
                    self._prefill_tokens_per_s = incoming.receipt.context_tokens / read_s
                yield self.arrivals.status(incoming)
                return

    async def _next(self, frames: AsyncIterator[bytes], incoming: Incoming | None = None) -> bytes:
        """The next frame of a stream.

        Raises TruncatedError where it ends, or brings none for long; BusyError where it has a place and
        does not begin.
        """
        begun = incoming is not None and incoming.begun
        wait_s = self.settings.idle_s if begun else self.settings.start_s
        try:
            return await asyncio.wait_for(anext(frames), wait_s)
        except TimeoutError:
            if incoming is not None and not begun:
                raise BusyError(
                    f"no frame within {wait_s:g} s after the manifest: the place goes to others; try again"
                ) from None
            how = f"brought nothing for {wait_s:g} s"
        except StopAsyncIteration:
            how = "ended"
        where = incoming.intake.session.next_sequence if incoming else 0
        raise TruncatedError(
            f"the stream {how} before frame {where}; the same transfer id and manifest resume it there"
        )

    async def generate(self, ask: Ask, caller: Caller = NOBODY) -> AsyncGenerator[Piece, None]:
        """Answer from a held cache, a token at a time, on a view of its own."""
        most = self.settings.max_new_tokens
        if ask.max_new_tokens > most:
            raise ContextError(f"max_new_tokens is at most {most} here, got {ask.max_new_tokens}")
        self._receiver.lm.require_room("the question", ask.question)
        await self.arrivals.recall_cache(ask.cache_id)
        with self.store.lease(ask.cache_id, caller.name) as held:  # stays whole until the last token

            def steps() -> Iterator[Step]:
                return self._receiver.generate(
                    held,
                    ask.question,
                    max_new_tokens=ask.max_new_tokens or NEW_TOKENS,
                    temperature=ask.temperature,
                    seed=ask.seed,
                )

            with (
                await self._generations.enter(caller.account),
                self.observer.span("generate", caller.trace, transfer=held.receipt.transfer_id) as told,
            ):
                first_s = last_s = 0.0
                count = 0
                async with aclosing(stream(lambda: self._turns.each(caller.account, steps))) as made:
                    async for step in made:
                        first_s, last_s, count = first_s or step.elapsed_s, step.elapsed_s, count + 1
                        yield Piece(step.text, (step.token_id,))
                told.attributes |= {"tokens": count, "first_token_s": first_s}
            self.observer.count("generated_tokens", "Tokens generated", count)
            self.observer.stage("first_token", first_s)
            receipt = held.receipt.with_stages(first_token=first_s, generate=last_s - first_s)
            yield Piece("", (), True, receipt)

    def delete_cache(self, cache_id: str, caller: Caller = NOBODY) -> None:
        self.arrivals.forget_cache(cache_id, caller)

    async def transfer_status(self, transfer_id: bytes, caller: Caller = NOBODY) -> PushStatus:
        self.sweep()
        return self.arrivals.find(transfer_id, caller)

    async def cancel_transfer(self, transfer_id: bytes, caller: Caller = NOBODY) -> None:
        """Give up a transfer that is on its way; what is complete stays. Unknown ids are fine."""
        await self.arrivals.cancel(transfer_id, caller)

    def sweep(self) -> None:
        """End what is over: caches past their lifetime, transfers past their deadline."""
        self.store.sweep()
        self.arrivals.sweep()
