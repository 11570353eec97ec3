"""A client that is used in the wrong way, or dials the wrong door, says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from kvlink.errors import ConfigError, CredentialsError, LocalProtocolError
from kvlink.transport.api import Ask, Delivery, Fetch
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.server import Server

CALLS: dict[str, tuple[type, Callable]] = {
    "receiver capabilities": (ReceiverClient, lambda c: c.capabilities()),
    "generate": (ReceiverClient, lambda c: c.generate(Ask("id", "Who?"))),
    "push": (ReceiverClient, lambda c: c.push([b"frame"])),
    "delete": (ReceiverClient, lambda c: c.delete_cache("id")),
    "sender capabilities": (SenderClient, lambda c: c.capabilities()),
    "publish": (SenderClient, lambda c: c.publish("text")),
    "fetch": (SenderClient, lambda c: c.fetch(Fetch("id"))),
    "deliver": (SenderClient, lambda c: c.deliver(Delivery("127.0.0.1:1", "Who?", text="text"))),
}


async def made(call) -> None:
    """A call, to its end."""
    if hasattr(call, "__aiter__"):
        async with contextlib.aclosing(call):
            async for _ in call:
                pass
    else:
        await call


@pytest.mark.parametrize("name", CALLS)
async def test_outside_of_its_context_manager_a_client_says_so(name):
    kind, call = CALLS[name]
    server = Server("127.0.0.1:0", receiver=object())  # type: ignore[arg-type]
    client = kind(f"127.0.0.1:{await server.start()}")
    message = rf"not connected: calls go inside of 'async with {kind.__name__}"
    with pytest.raises(LocalProtocolError, match=message):
        await made(call(client))
    async with client:
        pass
    with pytest.raises(LocalProtocolError, match=message):
        await made(call(client))
    await server.stop(0)


@pytest.mark.parametrize("name", CALLS)
async def test_the_other_service_is_named(name):
    kind, call = CALLS[name]
    there = {"sender" if kind is ReceiverClient else "receiver": object()}
    server = Server("127.0.0.1:0", **there)
    port = await server.start()
    own, other = ("Receiver", "Sender") if kind is ReceiverClient else ("Sender", "Receiver")
    async with kind(f"127.0.0.1:{port}") as client:
        with pytest.raises(
            ConfigError, match=rf"expected a kvlink.v1.{own}Service, found a kvlink.v1.{other}Service"
        ):
            await made(call(client))
    await server.stop(0)


async def test_a_server_of_something_else_is_named_as_such():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with ReceiverClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(ConfigError, match="found no service of kvlink"):
            await client.capabilities()
    await server.stop(0)


@contextlib.asynccontextmanager
async def speaking(answer: bytes) -> AsyncIterator[str]:
    """A server that answers whoever has said something with `answer`, and closes."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if await reader.read(1):
                writer.write(answer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
        (b"\x15\x03\x01\x00\x02\x02\x0a", "needs --credentials"),
        (b"220 mail ready\r\n", "220 mail ready"),
        (b"\x00\xff\x1b]0;x\x07", "no gRPC"),
    ],
)
async def test_a_port_without_grpc_is_named_at_once(answer, found):
    async with speaking(answer) as address:
        with pytest.raises((ConfigError, CredentialsError), match=found) as refused:
            async with ReceiverClient(address):
                pass
        assert "within" not in str(refused.value), "waited for what will not come"
