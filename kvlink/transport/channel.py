"""A channel to one agent: who is dialled, signs of life, and every answer checked as it comes.

A client dials only whom it may: with credentials the peers that they list, each by the name that its
certificate must bear and with the token meant for it; without, loopback, unless told `insecure`.

Every call has a deadline, and a stream that gives no sign of life for `QUIET_S` is taken for dead.

Does not know: what a call is for. Place on the path: under the clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvlink.bounds import MESSAGE
from kvlink.defaults import CALL_S
from kvlink.errors import (
    ConfigError,
    KvlinkError,
    LocalProtocolError,
    PeerUnavailableError,
    RemoteProtocolError,
)
from kvlink.observe import current_parent
from kvlink.receipt import Capabilities
from kvlink.transport import convert
from kvlink.transport.address import Address
from kvlink.transport.calls import ASKED_BY, READERS
from kvlink.transport.credentials import Credentials, Dial
from kvlink.transport.link import CONNECT_S
from kvlink.transport.reach import listening, refusal
from kvlink.transport.sockets import SocketCount, connections
from kvlink.transport.status import from_rpc_error
from kvlink.v1 import common_pb2
from kvlink.wire import checked

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE.most),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that its bytes can be counted
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # signs of life are faster; this is for calls without them
    ("grpc.http2.max_pings_without_data", 0),
    # Nothing in a machine's environment decides through whose hands a cache goes.
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
    ("grpc.enable_retries", 0),  # a transfer resumes in the protocol
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
QUICK_S = 20.0
"""The deadline of calls that do no work."""
QUIET_S = 6.5
"""Three signs of life that did not come, and a little."""
_PING_BYTES = 256
"""Fewer in `QUIET_S` are pings that a library answers, whatever has become of its agent."""
ATTEMPTS = 4
_SERVICES = ("kvlink.v1.SenderService", "kvlink.v1.ReceiverService")


class Client:
    """A channel to one agent. Use as an async context manager.

    `timeout_s`: the deadline of calls that do work. `trace`: W3C traceparent of the span that the calls
    belong to, else the current one. `patience_s`: how long a peer that refuses connections is taken to be
    on its way up, at most `CONNECT_S`. Raises AccessError and CredentialsError before
    anything is sent, PeerUnavailableError where nobody answers.
    """

    _service: ClassVar[Any]
    """Its descriptor."""

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
        self._at = Address.parse(address)
        self._trace = trace
        self._patience_s = patience_s
        self.address = str(self._at)
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._dial: Dial | None = None
        if credentials is not None:
            self._dial = credentials.dial(self.address)
        else:
            self._at.check_open(insecure, "dial")
        self._channel: Any = None
        self._local_port = 0

    async def __aenter__(self) -> Self:
        before = connections(self._at.host, self._at.port)
        if self._credentials is not None and self._dial is not None:
            options = [*_OPTIONS, ("grpc.ssl_target_name_override", self._dial.name)]
            proof = self._credentials.channel()
            self._channel = grpc.aio.secure_channel(self.address, proof, options=options)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        try:
            await self._ready(self._patience_s)
        except BaseException:
            await self._channel.close()
            raise
        new = set(connections(self._at.host, self._at.port)) - set(before)
        self._local_port = new.pop() if len(new) == 1 else 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        channel, self._channel = self._channel, None
        await channel.close()

    @property
    def _connected(self) -> Any:
        """The channel. Raises LocalProtocolError before and after the client is used as a context manager."""
        if self._channel is None:
            raise LocalProtocolError(
                f"{self.address}: the client is not connected: calls go inside of "
                f"'async with {type(self).__name__}(…) as client:'"
            )
        return self._channel

    async def _ready(self, patience_s: float = 0.0) -> None:
        """Wait for a connection. What waiting does not mend is told at once, and why.

        `patience_s`: so long a peer that cannot be reached is taken to be on its way up again.
        """
        began = time.monotonic()
        channel = self._connected
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                why = await refusal(self._at, self._credentials, self._dial)
                patient = isinstance(why, PeerUnavailableError) and time.monotonic() - began < patience_s
                if why is not None and not patient:
                    raise why
            left_s = CONNECT_S - (time.monotonic() - began)
            try:
                await asyncio.wait_for(channel.wait_for_state_change(state), left_s)
            except TimeoutError:
                raise PeerUnavailableError(
                    f"{self.address}: no agent answers within {CONNECT_S:g} s{await self._hint()}"
                ) from None
            state = channel.get_state(try_to_connect=True)

    async def _hint(self) -> str:
        """What a peer that listens but does not answer may want."""
        if self._dial is not None or await listening(self._at):
            return ""
        return "; something listens there: an agent with TLS needs --credentials here too"

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted on this client's connection; None where it cannot be told."""
        return connections(self._at.host, self._at.port).get(self._local_port)

    async def health(self) -> str:
        """SERVING, NOT_SERVING or UNKNOWN."""
        check = health_pb2_grpc.HealthStub(self._connected).Check
        try:
            response = await check(health_pb2.HealthCheckRequest(), timeout=QUICK_S, metadata=self._shown())
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        known = health_pb2.HealthCheckResponse.ServingStatus.values()
        status = response.status if response.status in known else 0
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    async def _told(self, error: grpc.RpcError) -> KvlinkError:
        """The package's error for gRPC's; where there is no such service, which one answers instead."""
        found = from_rpc_error(error, self.address)
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED or found.reported:
            return found
        check = health_pb2_grpc.HealthStub(self._connected).Check
        others = []
        for name in _SERVICES:
            with contextlib.suppress(grpc.RpcError):
                await check(
                    health_pb2.HealthCheckRequest(service=name), timeout=QUICK_S, metadata=self._shown()
                )
                others.append(name)
        own = self._service.full_name
        if own in others:  # this method alone is not known there
            return found
        there = f"a {' and a '.join(others)}" if others else "no service of kvlink"
        return ConfigError(
            f"{self.address}: expected a {own}, found {there}: is the address another agent's?"
        )

    def _shown(self, readers: Sequence[str] = (), asked_by: str = "") -> list[tuple[str, str]]:
        """Metadata of a call: the token that is meant for this peer, and who else may read or remove."""
        token = [("authorization", f"Bearer {self._dial.token}")] if self._dial else []
        parent = self._trace or current_parent()
        trace = [("traceparent", parent)] if parent else []
        asker = [(ASKED_BY, asked_by)] if asked_by else []
        return [*token, *trace, *asker, *((READERS, name) for name in readers)]

    def _method(self, name: str) -> Any:
        """A method of the service: messages in, bytes out."""
        method = self._service.methods_by_name[name]
        kinds = ("unary", "stream")
        arity = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        return getattr(self._connected, arity)(
            f"/{self._service.full_name}/{name}",
            request_serializer=_to_bytes,
            response_deserializer=None,
        )

    def _understood(self, name: str, data: bytes) -> Any:
        """The answer of a method. Raises RemoteProtocolError where a field of it is out of range."""
        kind = self._service.methods_by_name[name].output_type
        try:
            return checked.read(GetMessageClass(kind), data, RemoteProtocolError)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.address}: {error}") from None

    async def _unary(self, name: str, request: Any, timeout_s: float = 0.0) -> Any:
        call = self._method(name)(request, timeout=timeout_s or self.timeout_s, metadata=self._shown())
        try:
            data = await call
        except grpc.RpcError as error:
            raise await self._told(error) from error
        return self._understood(name, data)

    async def _messages(
        self, name: str, request: Any, *, bulk: bool = False, asked_by: str = ""
    ) -> AsyncGenerator[Any, None]:
        """The answers of a stream. Raises PeerUnavailableError where none comes for `QUIET_S`.

        `bulk`: signs of life wait behind large answers, so that bytes on the connection are one too.
        """
        shown = self._shown(asked_by=asked_by)
        call = self._method(name)(request, timeout=self.timeout_s, metadata=shown)
        try:
            while (data := await self._read(call, bulk)) is not grpc.aio.EOF:
                yield self._understood(name, data)
            if await call.code() is not grpc.StatusCode.OK:
                raise await self._told(await error_of(call))
        except grpc.RpcError as error:
            raise await self._told(error) from error
        finally:
            call.cancel()

    async def _read(self, call: Any, bulk: bool = False) -> Any:
        """The next answer of a stream. Raises PeerUnavailableError where there is no sign of life."""
        reading = asyncio.ensure_future(call.read())
        try:
            before = self._received_bytes() if bulk else 0
            while not (await asyncio.wait({reading}, timeout=QUIET_S))[0]:
                now = self._received_bytes() if bulk else 0
                if now - before < _PING_BYTES:
                    raise PeerUnavailableError(f"{self.address}: no sign of life for {QUIET_S:g} s")
                before = now
            return reading.result()
        finally:
            reading.cancel()

    def _received_bytes(self) -> float:
        """What has come on the connection; where nobody can tell, more each time."""
        found = self.socket_count()
        return time.monotonic() * _PING_BYTES * 10 if found is None else found.bytes_received

    async def _tell(self, name: str, request: Any) -> None:
        """A call that may fail: what it says is then found out by the peer's own clock."""
        with contextlib.suppress(KvlinkError, asyncio.CancelledError):
            await asyncio.shield(self._unary(name, request, 2.0))

    async def _again(self, attempt: Callable[[], AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
        """The items of `attempt()`, made again where the link fails.

        Gives up after `ATTEMPTS` that brought nothing new.
        """
        failed, until = 0, time.monotonic() + self.timeout_s
        while True:
            try:
                if failed:
                    await self._ready(CONNECT_S)
                async with contextlib.aclosing(attempt()) as items:
                    async for item in items:
                        failed = 0
                        yield item
                return
            except PeerUnavailableError as error:
                failed += 1
                told_so = error.reported and not error.retry_after_s
                pause_s = max(0.25 * failed, error.retry_after_s)
                if told_so or failed >= ATTEMPTS or time.monotonic() + pause_s > until:
                    raise
                await asyncio.sleep(pause_s)

    async def capabilities(self) -> Capabilities:
        """What the agent is and can do."""
        request = common_pb2.GetCapabilitiesRequest()
        response = await self._unary("GetCapabilities", request, QUICK_S)
        try:
            return convert.capabilities_from_proto(response.capabilities)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.address}: {error}") from None


def _to_bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())


async def error_of(call: Any) -> grpc.RpcError:
    """The error that a stream ended with, which reading it to its end does not raise."""
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )
