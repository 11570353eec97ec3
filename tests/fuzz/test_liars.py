"""Clients and agents that talk to a peer which answers anything: errors of the package, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvlink.errors import RemoteProtocolError
from kvlink.transport.client import ReceiverClient
from kvlink.v1 import common_pb2
from tests.agent.lying import serve
from tests.fuzz.liars import Liar, fuzz_clients

CALLS = 300


@pytest.mark.parametrize("seed", range(3))
async def test_clients_have_an_error_for_whatever_is_answered(seed, caplog):
    liar = Liar(seed, common_pb2.GetCapabilitiesResponse())
    port = await liar.start()
    ends, faults = await fuzz_clients(f"127.0.0.1:{port}", CALLS, seed)
    await liar.stop()
    assert faults == []
    assert sum(ends.values()) == CALLS
    assert not [record for record in caplog.records if record.exc_info], "a traceback in a log"


async def test_answers_that_are_no_message_are_named(caplog):
    async def answers(name: str, context: Any) -> AsyncIterator[bytes]:
        yield b"\x0a\xff\xff\xff\xff\x0f"

    server, port = await serve(answers)
    async with ReceiverClient(f"127.0.0.1:{port}") as target:
        with pytest.raises(
            RemoteProtocolError, match="expected a PushCacheResponse, found 6 bytes that are none"
        ):
            [item async for item in target.push([b"frame"])]
        with pytest.raises(RemoteProtocolError, match="expected a GetTransferStatusResponse"):
            await target.transfer_status(b"t" * 16)
    await server.stop(0)
    assert not caplog.records
