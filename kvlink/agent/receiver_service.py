"""The receiver agent as a service: transfers in, caches held, questions answered.

Does not know: gRPC. Place on the path: the receiver's edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from blake3 import blake3

from kvlink._release import RELEASE
from kvlink.agent.admission import Gate
from kvlink.agent.inbound import InboundTransfer, InboundTransfers
from kvlink.agent.pulls import Pulls
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
    IntegrityError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.generate import Step
from kvlink.observe import Observer
from kvlink.receipt import Capabilities
from kvlink.transport.api import NOBODY, Ask, Caller, Piece, PushStatus
from kvlink.transport.link import DialSender

log = logging.getLogger("kvlink.receiver")


class ReceiverService:
    """Handles the calls of `ReceiverService` in the proto."""

    def __init__(
        self,
        receiver: Receiver,
        settings: ReceiverSettings | None = None,
        observer: Observer | None = None,
        dial: DialSender | None = None,
    ) -> None:
        """`dial`: links to senders whose handles are redeemed."""
        self._receiver = receiver
        self.settings = told = settings or ReceiverSettings()
        receiver.profiles.bound(told.max_profiles_bytes, told.max_peer_profiles_bytes)
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
        self.inbound = InboundTransfers(receiver, self.store, told, self.observer)
        self._pulls = Pulls(told, self.store, self.push_cache, dial, self.capabilities)
        self._prefill_tokens_per_s = 0.0
        for name, what, read in (
            ("held_bytes", "Bytes of held caches", lambda: self.store.held_bytes),
            ("reserved_bytes", "Bytes promised to transfers", lambda: self.store.reserved_bytes),
            ("transfers_open", "Transfers on their way in", lambda: self.inbound.gate.inside),
            ("transfers_waiting", "Transfers that wait for a place", lambda: self.inbound.gate.queued),
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
                "max_context_tokens": min(limits.max_context_tokens, lm.window - 1),
                "max_frame_bytes": limits.max_frame_bytes,
                "max_segments": limits.max_segments,
                "max_text_bytes": limits.max_text_bytes,
                "max_new_tokens": self.settings.max_new_tokens,
                "max_profile_bytes": self._receiver.profiles.max_file_bytes,
            },
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            profiles=tuple(bytes.fromhex(digest) for digest in self._receiver.known_profiles()),
            address=self.settings.advertised_address,
        )

    async def put_profile(
        self, digest: bytes, total_bytes: int, pieces: AsyncIterator[bytes], caller: Caller = NOBODY
    ) -> None:
        """Take a profile that a sender sends ahead of its transfers, into room of that peer's share.

        Raises LimitError and BusyError before anything is taken, TruncatedError, RemoteProtocolError (more
        than was said), IntegrityError, and what is wrong with the profile.
        """
        with self._receiver.profiles.room(total_bytes, caller.account) as keep:
            data = bytearray()
            while piece := await self._piece(pieces):
                data += piece
                if len(data) > total_bytes:
                    raise RemoteProtocolError(f"a profile of {total_bytes} bytes was announced, more came")
            if len(data) < total_bytes:
                raise TruncatedError(f"the profile ends after {len(data)} of {total_bytes} bytes")
            if blake3(data).digest(length=len(digest)) != digest:
                raise IntegrityError(
                    "the profile that came is not the one that was announced: digests differ"
                )
            keep(await to_thread(self._receiver.read_profile, bytes(data)))

    async def _piece(self, pieces: AsyncIterator[bytes]) -> bytes:
        """The next piece of a profile, none at its end. Raises TruncatedError where none comes for long."""
        try:
            return await asyncio.wait_for(anext(pieces, b""), self.settings.idle_s)
        except TimeoutError:
            raise TruncatedError(
                f"the profile's stream brought nothing for {self.settings.idle_s:g} s"
            ) from None

    async def push_cache(
        self, frames: AsyncIterator[bytes], caller: Caller = NOBODY
    ) -> AsyncGenerator[PushStatus, None]:
        """Take a transfer: accepted, durable as frames are kept, complete or enough. See the proto."""
        self.sweep()
        transfer = await self.inbound.admit(await self._first(frames), caller)
        stream = transfer.life.stream
        with self.observer.span("receive", caller.trace, transfer=transfer.key.hex()) as told:
            try:
                async with aclosing(self._feed(transfer, frames, stream)) as statuses:
                    async for status in statuses:
                        yield status
            except (TruncatedError, BusyError, asyncio.CancelledError, GeneratorExit):
                # Resumable: the sweep ends it if nobody comes. Who leaves after the end has cut nothing.
                if transfer.life.on_its_way:
                    self.inbound.apply(transfer, "cut", stream=stream)
                raise
            except Exception as error:
                if transfer.life.on_its_way:
                    self.inbound.apply(transfer, "refused", f"{type(error).__name__}: {error}", stream=stream)
                raise
            finally:
                told.attributes |= {"state": transfer.life.state, "wire_bytes": transfer.receipt.wire_bytes}

    async def _feed(
        self, transfer: InboundTransfer, frames: AsyncIterator[bytes], stream: int
    ) -> AsyncGenerator[PushStatus, None]:
        """Take the frames of one stream into a transfer that was admitted."""
        async with transfer.lock:  # what an earlier stream brought last is counted
            await self.inbound.settle(transfer)
            status = self.inbound.status(transfer)
        yield status
        while not transfer.life.held:
            frame, durable = await self._next(frames, transfer), False
            async with transfer.lock:
                if frame is not None and not (transfer.life.held and transfer.life.stream == stream):
                    durable = await self.inbound.take(transfer, stream, frame)
            if durable:
                yield self.inbound.status(transfer, "durable")
            if transfer.life.held:
                read_s = transfer.receipt.stage_s.get("read")
                if read_s:
                    self._prefill_tokens_per_s = transfer.receipt.context_tokens / read_s
                yield self.inbound.status(transfer)

    async def _first(self, frames: AsyncIterator[bytes]) -> bytes:
        """The first frame of a stream. Raises TruncatedError where none comes."""
        try:
            return await asyncio.wait_for(anext(frames), self.settings.start_s)
        except TimeoutError:
            raise _cut(f"brought nothing for {self.settings.start_s:g} s", 0) from None
        except StopAsyncIteration:
            raise _cut("ended", 0) from None

    async def _next(self, frames: AsyncIterator[bytes], transfer: InboundTransfer) -> bytes | None:
        """The next frame of a stream, None where none is needed any more.

        Raises TruncatedError where it ends, or brings none for long; BusyError where it has a place and
        does not begin; DeadlineError where the transfer's time is over.
        """
        waits = self.inbound.settings.waits
        at, _ = transfer.life.next_due(waits)
        if (left_s := at - time.monotonic()) > 0:
            try:
                return await asyncio.wait_for(anext(frames), left_s)
            except TimeoutError:
                pass
            except StopAsyncIteration:
                raise _cut("ended", transfer.intake.session.next_sequence) from None
        async with transfer.lock:
            event = self.inbound.expire(transfer, at)
        if transfer.life.held:
            return None
        if transfer.life.state == "forgotten":
            raise BusyError(
                f"no frame within {waits.start_s:g} s after the manifest: the place goes to others; try again"
            )
        if transfer.life.on_its_way:
            how = f"brought nothing for {waits.idle_s:g} s" if event == "idle" else "was taken over"
            raise _cut(how, transfer.intake.session.next_sequence)
        raise DeadlineError(f"this transfer is over: {transfer.life.why or transfer.life.state}")

    async def generate(self, ask: Ask, caller: Caller = NOBODY) -> AsyncGenerator[Piece, None]:
        """Answer from a held cache, a token at a time, on a view of its own."""
        most = self.settings.max_new_tokens
        if ask.max_new_tokens > most:
            raise ContextError(f"max_new_tokens is at most {most} here, got {ask.max_new_tokens}")
        self._receiver.lm.require_room("the question", ask.question)
        cache_id = await self._pulls.cache_id(ask, caller) if ask.handle else ask.cache_id
        await self.inbound.recall_cache(cache_id)
        with self.store.lease(cache_id, caller.name) as held:  # stays whole until the last token

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
            yield Piece("", (), True, receipt, cache_id)

    def delete_cache(self, cache_id: str, caller: Caller = NOBODY) -> None:
        self.inbound.forget_cache(cache_id, caller)

    async def transfer_status(self, transfer_id: bytes, caller: Caller = NOBODY) -> PushStatus:
        self.sweep()
        return self.inbound.find(transfer_id, caller)

    async def cancel_transfer(self, transfer_id: bytes, caller: Caller = NOBODY) -> None:
        """Give up a transfer that is on its way; what is complete stays. Unknown ids are fine."""
        await self.inbound.cancel(transfer_id, caller)

    def sweep(self) -> None:
        """End what is over: caches past their lifetime, transfers past their deadline."""
        self.store.sweep()
        self.inbound.sweep()


def _cut(how: str, number: int) -> TruncatedError:
    return TruncatedError(
        f"the stream {how} before frame {number}; the same transfer id and manifest resume it there"
    )
