"""Calls that random messages have found at fault once: what they end as, on real gRPC. Never INTERNAL, never UNKNOWN."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvlink.transport import convert
from kvlink.transport.status import CODES
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.agent.conftest import QUESTION, TEXT
from tests.agent.lying import serve
from tests.limits import HANGS_S

SERVICES = {
    "receiver": receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"],
    "sender": sender_pb2.DESCRIPTOR.services_by_name["SenderService"],
}
METHODS = [(kind, method.name) for kind, service in SERVICES.items() for method in service.methods]


async def end_of(pair, kind: str, method: str, *messages: bytes) -> tuple[str, str]:
    """Status and details of a call with these messages, whatever the method expects."""
    address = {"receiver": pair.target, "sender": pair.source}[kind].address
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICES[kind].full_name}/{method}", None, None)(timeout=HANGS_S)
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


@pytest.mark.parametrize("method", ["GetCapabilities", "PushCache"])
async def test_a_receiver_that_fails_is_no_fault_of_the_sender(pair, method):
    """Whatever a receiver's call ends as, the delivery to it does not end as INTERNAL or UNKNOWN."""
    there = common_pb2.GetCapabilitiesResponse(
        capabilities=convert.capabilities_to_proto(pair.receiver.capabilities())
    ).SerializeToString()
    endings = [(code, "") for code in list(grpc.StatusCode)[1:]]
    endings += [(grpc.StatusCode.INTERNAL, cls.__name__) for cls in CODES]

    async def answers(name: str, context: Any) -> AsyncIterator[bytes]:
        if name == "GetCapabilities" != method:
            yield there
            return
        proto = status_pb2.Status(code=code.value[0], message="it failed")
        proto.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="kvlink"))
        await context.abort_with_status(rpc_status.to_status(proto))
        yield b""

    server, port = await serve(answers)
    ends = {}
    for code, reason in endings:
        request = sender_pb2.DeliverCacheRequest(
            text=TEXT, question=QUESTION, recipe="int8", receiver=f"127.0.0.1:{port}"
        )
        ends[code.name, reason] = await end_of(pair, "sender", "DeliverCache", request.SerializeToString())
    await server.stop(0)
    assert {how: end for how, end in ends.items() if end[0] in ("INTERNAL", "UNKNOWN", "OK")} == {}
