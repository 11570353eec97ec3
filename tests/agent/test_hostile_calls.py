"""Calls that random messages have found at fault once: what they end as, on real gRPC. Never INTERNAL, never UNKNOWN."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import grpc
import pytest

from kvlink.v1 import receiver_pb2, sender_pb2

SERVICES = {
    "receiver": receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"],
    "sender": sender_pb2.DESCRIPTOR.services_by_name["SenderService"],
}
METHODS = [(kind, method.name) for kind, service in SERVICES.items() for method in service.methods]


async def end_of(pair, kind: str, method: str, *messages: bytes) -> tuple[str, str]:
    """Status and details of a call with these messages, whatever the method expects."""
    address = {"receiver": pair.target, "sender": pair.source}[kind].address
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICES[kind].full_name}/{method}", None, None)(timeout=60)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # it is over: the status says how
            for message in messages:
                await call.write(message)
            await call.done_writing()
        with contextlib.suppress(grpc.RpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return (await call.code()).name, await call.details()


@pytest.mark.parametrize(("kind", "method"), METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(pair, kind, method, caplog):
    status, details = await end_of(pair, kind, method, b"\x0a\xff\xff\xff\xff\x0fno message")
    assert status == "INVALID_ARGUMENT", details
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
