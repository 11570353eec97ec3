"""Around every call that an agent serves: who calls, signs of life, errors as statuses.

Does not know: what a call does. Place on the path: between gRPC and the services.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import grpc

from kvlink.errors import CredentialsError, InputError, KvlinkError, RemoteProtocolError, StoppingError
from kvlink.transport.api import Caller
from kvlink.transport.certs import NAME
from kvlink.transport.credentials import Credentials
from kvlink.transport.status import CODES, to_status
from kvlink.wire import checked

log = logging.getLogger("kvlink.transport")

BEAT_S = 2.0
"""A stream that has nothing to say gives a sign of life this often."""

READERS = "kvlink-for"
"""Metadata of a push: a peer that may use the cache, beside the one that sends it."""

ASKED_BY = "kvlink-asked-by"
"""Metadata of a push: the peer that asked for it. It may use the cache, and delete it."""

_MAX_READERS = 16


class InFlight:
    """The calls of one agent that are at work, and how they end when it stops. For one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut: asyncio.Future[None] | None = None

    @property
    def cut_off(self) -> asyncio.Future[None]:
        """Done once calls are not waited for any longer."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().create_future()
        return self._cut

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around a call. Raises StoppingError where it came too late."""
        if self._stopping:
            raise StoppingError()
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def stop(self, drain_s: float) -> int:
        """Refuse new calls, let the others end within `drain_s`, cut off the rest; how many those were."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_s)
        if not self.cut_off.done():
            self.cut_off.set_result(None)
        return self._count

    async def result(self, work: Awaitable[Any]) -> Any:
        """What `work` gives. Raises StoppingError where it is cut off; what it does is then left alone."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self.cut_off}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if not task.done():
            _leave(task)
            raise StoppingError()
        return task.result()


def _leave(task: asyncio.Future[Any]) -> None:
    """Cancel without waiting: a thread cannot be stopped half-way, and the process is about to end."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


class Guard:
    """Finds out who calls, and whether they may. Without credentials everybody is nobody, and may."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self.calls = InFlight()

    def caller(self, context: Any, method: str) -> Caller:
        """Raises CredentialsError, AccessError, InputError."""
        shown = [(str(key), value) for key, value in context.invocation_metadata() or ()]
        readers = tuple(str(value) for key, value in shown if key == READERS)
        asked_by = next((str(value) for key, value in shown if key == ASKED_BY), "")
        check_readers((*readers, asked_by) if asked_by else readers)
        name = ""
        if self._credentials is not None:
            name = _proven(context)
            token = next((str(value) for key, value in shown if key == "authorization"), "")
            self._credentials.admit(name, token.removeprefix("Bearer "), method)
        trace = next((str(value) for key, value in shown if key == "traceparent"), "")
        host = "" if name else _host(context.peer())
        return Caller(name, readers, context.time_remaining(), trace, asked_by, host)


def check_readers(names: Sequence[str]) -> None:
    """Raise InputError unless these are names of peers, and few."""
    if len(names) > _MAX_READERS or not all(NAME.fullmatch(name) for name in names):
        raise InputError(f"readers: expected at most {_MAX_READERS} names of peers")


def _host(peer: str) -> str:
    """The host in gRPC's word for a connection, such as `ipv4:10.0.0.5:43210`; of IPv6 the network.

    Whoever has one IPv6 address has its whole /64, and could come from another one at each call.
    """
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((found.packed, 64), strict=False))


def _proven(context: Any) -> str:
    """The name in the caller's certificate, which the handshake has checked."""
    found = context.auth_context().get("x509_common_name") or []
    if len(found) != 1:
        raise CredentialsError("a certificate with one name is needed here")
    return str(found[0].decode(errors="replace"))


async def _refuse(context: Any, error: Exception) -> None:
    """End a call with the error's status; what is not ours is logged and told as internal."""
    if not isinstance(error, KvlinkError):
        log.exception("a call failed")
        error = KvlinkError(f"internal error: {type(error).__name__}; the agent's log has more")
    else:
        log.info("refused: %s: %s", type(error).__name__, error)
        if error.reported and CODES[type(error)] is grpc.StatusCode.INTERNAL:
            error = RemoteProtocolError(error)  # another agent's fault, which is not this one's
    await context.abort_with_status(to_status(error))


def reader(message_class: Any) -> Callable[[bytes], Any]:
    """Makes a checked request of its bytes, or the error that says what is wrong with it.

    gRPC ends a call whose deserializer raises as UNKNOWN, with a traceback in the log.
    """

    def read(data: bytes) -> Any:
        try:
            return checked.read(message_class, data, InputError)
        except InputError as error:
            return error

    return read


def _checked(request: Any) -> Any:
    """A request that `reader` made, or a stream of them. Raises what it found wrong, of a stream when it comes."""
    if hasattr(request, "__aiter__"):
        return _each_checked(request)
    if isinstance(request, KvlinkError):
        raise request
    return request


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    async for request in requests:
        yield _checked(request)


def unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`method(self, request, caller)` as a handler of a call with one answer."""

    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            with self.guard.calls.one():
                caller = self.guard.caller(context, method.__name__)
                return await self.guard.calls.result(method(self, _checked(request), caller))
        except Exception as error:
            await _refuse(context, error)

    return call


def stream(beat: Callable[[], Any]) -> Callable[[Callable[..., AsyncIterator[Any]]], Any]:
    """`method(self, request, caller)` as a handler of a call with many answers.

    `beat`: makes a message that says nothing, sent when there is nothing else to send.
    """

    def decorate(method: Callable[..., AsyncIterator[Any]]) -> Any:
        async def call(self: Any, request: Any, context: Any) -> AsyncGenerator[Any, None]:
            try:
                with self.guard.calls.one():
                    caller = self.guard.caller(context, method.__name__)
                    answers = method(self, _checked(request), caller)
                    living = alive(answers, beat, self.guard.calls.cut_off)
                    async with contextlib.aclosing(living) as messages:
                        async for message in messages:
                            yield message
            except Exception as error:
                await _refuse(context, error)

        return call

    return decorate


async def alive(
    answers: AsyncIterator[Any], beat: Callable[[], Any], cut_off: asyncio.Future[None]
) -> AsyncGenerator[Any, None]:
    """`answers`, and a `beat()` after each `BEAT_S` without one. Closes `answers` when it is left.

    Raises StoppingError once they are cut off, and leaves them alone then.
    """
    pending: asyncio.Future[Any] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(answers))
            await asyncio.wait({pending, cut_off}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if cut_off.done():
                raise StoppingError()
            if not pending.done():
                yield beat()
                continue
            done, pending = pending, None
            try:
                message = done.result()
            except StopAsyncIteration:
                return
            yield message
    finally:
        if pending is not None:
            _leave(pending)
        if not cut_off.done():
            if pending is not None:
                await asyncio.gather(pending, return_exceptions=True)
            await answers.aclose()  # type: ignore[attr-defined]
