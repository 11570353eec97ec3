"""The same clients for code without an event loop: the same calls, iterators in the place of asynchronous ones.

    with SyncSenderClient(address) as sender:
        for progress in sender.deliver(delivery):
            ...

Every call runs in the clients of `transport.client`, on an event loop in a thread that all connected clients share and
that ends with the last of them. A call may be made from any thread, but not where an event loop runs: it would block it.

Does not know: what a call does. Place on the path: around the clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from kvlink.defaults import CALL_S
from kvlink.errors import LocalProtocolError
from kvlink.payload import TurnLike
from kvlink.receipt import Capabilities
from kvlink.transport.api import Ask, Delivery, Fetch, FrameSource, Piece, Progress, Published, PushStatus
from kvlink.transport.channel import Client
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.credentials import Credentials

T = TypeVar("T")
C = TypeVar("C", bound=Client)


class _Loop:
    """An event loop in a thread, there while somebody holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        with self._lock:
            self._holders += 1
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name="kvlink-clients", daemon=True
                )
                self._thread.start()

    def leave(self) -> None:
        with self._lock:
            self._holders -= 1
            loop, thread = self._loop, self._thread
            if self._holders or loop is None or thread is None:
                return
            self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. Whatever interrupts the wait for it cancels it. Raises LocalProtocolError."""
        if self._loop is None or _inside_a_loop():
            work.close()
            raise LocalProtocolError(
                "an event loop runs in this thread, and the call would block it: use the client without Sync"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and close it."""
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_LOOP = _Loop()


class SyncClient(Generic[C]):
    """A client without an event loop. Use as a context manager. Arguments as of `channel.Client`."""

    _kind: type[C]

    def __init__(
        self,
        address: str,
        credentials: Credentials | None = None,
        *,
        insecure: bool = False,
        timeout_s: float = CALL_S,
        trace: str = "",
        patience_s: float = 0.0,
    ) -> None:
        self._client = self._kind(
            address,
            credentials,
            insecure=insecure,
            timeout_s=timeout_s,
            trace=trace,
            patience_s=patience_s,
        )
        self.address = self._client.address
        self._open = False

    def __enter__(self) -> Self:
        _LOOP.hold()
        self._open = True
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self._open = False
            _LOOP.leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self._client.__aexit__(kind, error, trace))
        finally:
            self._open = False
            _LOOP.leave()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._open:
            work.close()
            raise LocalProtocolError(
                f"{self.address}: the client is not connected: calls go inside of "
                f"'with {type(self).__name__}(…) as client:'"
            )
        return _LOOP.run(work)

    def _each(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an asynchronous generator; leaving early ends it at both ends."""

        async def following() -> list[T]:
            async for item in items:
                return [item]
            return []

        try:
            while found := self._run(following()):
                yield found[0]
        finally:
            with contextlib.suppress(LocalProtocolError):  # the client was left before: so was the call
                self._run(items.aclose())

    def capabilities(self) -> Capabilities:
        return self._run(self._client.capabilities())

    def health(self) -> str:
        return self._run(self._client.health())


class SyncReceiverClient(SyncClient[ReceiverClient]):
    """Calls to a receiver agent: see `ReceiverClient`."""

    _kind = ReceiverClient

    def push(
        self,
        frames: Sequence[bytes] | FrameSource,
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
        *,
        fresh: bool = False,
    ) -> Iterator[PushStatus | int]:
        return self._each(self._client.push(frames, readers, timeout_s, asked_by, fresh=fresh))

    def transfer_status(self, transfer_id: bytes) -> PushStatus:
        return self._run(self._client.transfer_status(transfer_id))

    def cancel(self, transfer_id: bytes) -> None:
        self._run(self._client.cancel(transfer_id))

    def generate(self, ask: Ask) -> Iterator[Piece]:
        return self._each(self._client.generate(ask))

    def put_profile(self, data: bytes) -> bytes:
        return self._run(self._client.put_profile(data))

    def delete_cache(self, cache_id: str) -> None:
        self._run(self._client.delete_cache(cache_id))


class SyncSenderClient(SyncClient[SenderClient]):
    """Calls to a sender agent: see `SenderClient`."""

    _kind = SenderClient

    def publish(
        self,
        text: str,
        lifetime_s: int = 0,
        turns: Iterable[TurnLike] = (),
        readers: Sequence[str] = (),
        extends: str = "",
    ) -> Published:
        return self._run(self._client.publish(text, lifetime_s, turns, readers, extends))

    def unpublish(self, context_id: str) -> None:
        self._run(self._client.unpublish(context_id))

    def fetch(self, fetch: Fetch, asked_by: str = "", *, early: bool = True) -> Iterator[bytes]:
        return self._each(self._client.fetch(fetch, asked_by, early=early))

    def deliver(self, delivery: Delivery) -> Iterator[Progress]:
        return self._each(self._client.deliver(delivery))
