"""Reaching a peer: at once or a clear line, and never through anybody's hands that the caller did not name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvlink.errors import AccessError, ConfigError, PeerUnavailableError
from kvlink.transport import channel, reach
from kvlink.transport.address import Address
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.server import Server
from tests.command import free_address

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that takes connections; its address, and the first line of what each one asked for."""
    asked: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    listening = await asyncio.start_server(take, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked


@asynccontextmanager
async def serving(address: str = "127.0.0.1:0", after_s: float = 0.0) -> AsyncIterator[int]:
    """An agent that answers health checks, its port."""
    server = Server(address, receiver=object())  # type: ignore[arg-type]
    await asyncio.sleep(after_s)
    try:
        yield await server.start()
    finally:
        await server.stop(0)


@pytest.mark.parametrize("how", ["proxy variables", "address variables"])
async def test_no_environment_variable_sends_a_call_through_a_proxy(how, monkeypatch):
    async with serving() as port, proxy() as (at, asked):
        address = f"127.0.0.1:{port}"
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://{at}")
        monkeypatch.delenv("no_proxy", raising=False)
        if how == "address variables":
            for name in PROXIES:
                monkeypatch.delenv(name)
            monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", at)
            monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as plain:
            with pytest.raises(grpc.RpcError):
                await health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest())
        assert asked, "a channel without our options goes through it: the trap is set"
        asked.clear()
        for kind in (ReceiverClient, SenderClient):
            async with kind(address) as peer:
                assert await peer.health() == "SERVING"
        assert not asked


async def test_a_refused_connection_is_told_at_once(monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_S", 1e6)
    with pytest.raises(PeerUnavailableError, match=r"127\.0\.0\.1:\d+: nobody listens there"):
        async with ReceiverClient(free_address()):
            pass


async def test_an_unknown_host_is_told_at_once(monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert await reach.listening(Address("nowhere.invalid", 1)) == "no such host: Name or service not known"


async def test_a_peer_that_is_on_its_way_up_is_waited_for():
    address = free_address()

    async def ask() -> str:
        async with ReceiverClient(address, patience_s=channel.CONNECT_S) as peer:
            return await peer.health()

    asking = asyncio.create_task(ask())
    async with serving(address, after_s=0.5):
        assert await asking == "SERVING"


async def test_ipv6_works_in_brackets_in_every_spelling():
    try:
        async with (
            serving("[::1]:0") as port,
            ReceiverClient(f"[0:0:0:0:0:0:0:1]:{port}") as peer,
        ):
            assert peer.address == f"[::1]:{port}"
            assert await peer.health() == "SERVING"
            assert peer.socket_count() is not None
    except ConfigError:
        pytest.skip("no IPv6 loopback here")


@pytest.mark.parametrize("address", ["10.0.0.1:1", "[2001:db8::1]:1", "somewhere:1"])
async def test_nothing_off_loopback_is_dialled_unencrypted(address):
    with pytest.raises(AccessError, match="refusing to dial"):
        ReceiverClient(address)
