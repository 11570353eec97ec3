"""Servers: where they listen, what they tell, how they stop."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvlink.errors import AccessError, ConfigError, PeerUnavailableError
from kvlink.transport.client import ReceiverClient
from kvlink.transport.handle import Handle
from kvlink.transport.server import Server
from tests.limits import HANGS_S


@pytest.mark.parametrize("address", ["0.0.0.0:1", "192.168.1.4:1", "[::]:1", "receiver:1"])
def test_off_loopback_an_agent_refuses_to_start_unless_told(address):
    with pytest.raises(AccessError, match="--insecure"):
        Server(address)


async def test_a_taken_port_is_reported():
    first = Server("127.0.0.1:0")
    port = await first.start()
    with pytest.raises(ConfigError, match="is the port taken"):
        await Server(f"127.0.0.1:{port}").start()
    await first.stop(0)


async def test_health_and_reflection_answer():
    server = Server("127.0.0.1:0", receiver=object())  # type: ignore[arg-type]
    port = await server.start()
    async with ReceiverClient(f"127.0.0.1:{port}") as client:
        assert await client.health() == "SERVING"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for response in stub.ServerReflectionInfo(iter(requests)):
            names = [service.name for service in response.list_services_response.service]
            assert "kvlink.v1.ReceiverService" in names
            break
    await server.stop(0)
    with pytest.raises(PeerUnavailableError):
        async with asyncio.timeout(HANGS_S), ReceiverClient(f"127.0.0.1:{port}") as client:
            await client.health()


def test_handles_round_trip():
    handle = Handle("127.0.0.1:50051", "mmoPM5uDZguATDfWgCJ_kA")
    assert Handle.parse(str(handle)) == handle


@pytest.mark.parametrize(
    "text", ["", "kvlink://", "kvlink://host/id", "http://h:1/x", "kvlink://h:1/../etc", "kvlink://h:1/"]
)
def test_other_strings_are_no_handles(text):
    with pytest.raises(ConfigError):
        Handle.parse(text)


def test_that_a_caller_was_gone_is_no_traceback_and_what_else_grpc_logs_is_kept(caplog):
    grpc_log = logging.getLogger("grpc._cython.cygrpc")
    for name in ("ExecuteBatchError", "ValueError"):
        try:
            raise RuntimeError(name)
        except RuntimeError:
            grpc_log.exception("%s raised in core by servicer method [/kvlink.v1.X/Y]", name)
    assert [record.getMessage()[:10] for record in caplog.records if record.exc_info] == ["ValueError"]
