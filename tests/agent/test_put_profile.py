"""A profile sent ahead, in pieces, over real gRPC: large ones pass, a broken or false one leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from blake3 import blake3

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.errors import (
    BusyError,
    CodecError,
    IntegrityError,
    KvlinkError,
    LimitError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.model.loading import LanguageModel, load
from kvlink.profile import MEMORY_PER_BYTE, Profile, make_side
from kvlink.transport.api import Caller, Delivery
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server
from kvlink.transport.status import from_rpc_error
from kvlink.v1 import receiver_pb2
from tests.agent.conftest import QUESTION, TEXT
from tests.agent.lying import serve
from tests.conftest import make_checkpoint
from tests.limits import HANGS_S

LAYERS, HEADS, HEAD_SIZE = 15, 16, 64
LARGE_BYTES = 60_000_000


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> LanguageModel:
    """A small model with many channels: 1,024 of keys and as many of values, in 15 layers."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("wide"), "qwen2", num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_SIZE,
    )  # fmt: skip
    return load(str(folder))


@pytest.fixture(scope="module")
def large(wide) -> Profile:
    """A profile of it: every basis is a rotation of its heads, in one block."""
    channels = HEADS * HEAD_SIZE
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(1)))[0]
    sides = [make_side(torch.zeros(channels), [basis], torch.ones(channels)) for _ in range(2 * LAYERS)]
    return Profile(wide.fingerprint, tuple(sides[:LAYERS]), tuple(sides[LAYERS:]), {})


async def test_one_of_60_megabytes_travels_ahead_of_the_transfer_that_names_it(wide, large):
    data = large.to_bytes()
    assert len(data) > LARGE_BYTES
    receiver = ReceiverService(Receiver(replace(wide, profile=None)))
    sender = SenderService(Sender(replace(wide, profile=large)), SenderSettings(), dial=to_receivers())
    servers = [Server("127.0.0.1:0", receiver=receiver), Server("127.0.0.1:0", sender=sender)]
    ports = [await server.start() for server in servers]
    async with SenderClient(f"127.0.0.1:{ports[1]}") as source:
        delivery = Delivery(f"127.0.0.1:{ports[0]}", QUESTION, "transform=1", text=TEXT)
        *_, done = [progress async for progress in source.deliver(delivery)]
    assert done.done
    assert large.digest.hex() in done.receipt.recipe
    assert [*receiver._receiver.profiles] == [large.digest.hex()]
    assert receiver._receiver.profiles.promised_bytes == 0
    for server in servers:
        await server.stop(0)


Parts = Sequence[receiver_pb2.PutProfileRequest]


def start(total_bytes: int, digest: bytes = b"d" * 16) -> receiver_pb2.PutProfileRequest:
    return receiver_pb2.PutProfileRequest(
        start=receiver_pb2.PutProfileStart(digest=digest, total_bytes=total_bytes)
    )


def piece(data: bytes) -> receiver_pb2.PutProfileRequest:
    return receiver_pb2.PutProfileRequest(data=data)


NOTHING_MUCH = b"no profile"
LIES: dict[str, tuple[Parts, type[KvlinkError], str]] = {
    "nothing": ([], RemoteProtocolError, "the first message says what comes"),
    "no start": ([piece(b"x")], RemoteProtocolError, "the first message says what comes"),
    "neither of both": ([receiver_pb2.PutProfileRequest()], RemoteProtocolError, "the first message"),
    "a second start": ([start(9), start(9)], RemoteProtocolError, "expected bytes of the profile"),
    "an empty piece": ([start(9), piece(b"")], RemoteProtocolError, "expected bytes of the profile"),
    "more than was said": ([start(9), piece(b"x" * 10)], RemoteProtocolError, "of 9 bytes was announced"),
    "less than was said": ([start(9), piece(b"x" * 8)], TruncatedError, "after 8 of 9 bytes"),
    "another one": ([start(9), piece(b"x" * 9)], IntegrityError, "digests differ"),
    "no profile": (
        [start(len(NOTHING_MUCH), blake3(NOTHING_MUCH).digest(length=16)), piece(NOTHING_MUCH)],
        CodecError,
        "not a profile",
    ),
    "a piece of a megabyte and one": ([start(2**21), piece(b"x" * 1_000_001)], KvlinkError, "PutProfileRequest.data"),
    "more than anybody holds": ([start(2**62)], LimitError, "bytes: at most"),
}  # fmt: skip


async def put(address: str, parts: Parts, *, more: asyncio.Event | None = None) -> KvlinkError | None:
    """Send these parts, and wait for `more` before the end; how the call ends."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_unary("/kvlink.v1.ReceiverService/PutProfile", lambda m: m.SerializeToString())(
            timeout=HANGS_S
        )
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            for part in parts:
                await call.write(part)
            if more is not None:
                await more.wait()
            await call.done_writing()
        try:
            await call
        except grpc.RpcError as error:
            return from_rpc_error(error, "peer")
    return None


@pytest.mark.parametrize("name", LIES)
async def test_what_is_not_as_it_was_announced_is_refused_and_leaves_nothing(pair, name):
    parts, error, words = LIES[name]
    ended = await put(pair.target.address, parts)
    assert isinstance(ended, error)
    assert words in str(ended)
    profiles = pair.receiver._receiver.profiles
    assert (len(profiles), profiles.promised_bytes) == (0, 0)


async def reached(condition: Any) -> None:
    async with asyncio.timeout(HANGS_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_half_of_one_holds_its_room_until_its_stream_breaks(pair):
    """Room counts against the share of the peer that sends; another peer has its own."""
    profiles = pair.receiver._receiver.profiles
    profiles.bound(12_000 * MEMORY_PER_BYTE, 0)
    more = asyncio.Event()
    half = asyncio.create_task(put(pair.target.address, [start(6_000), piece(b"x" * 3_000)], more=more))
    await reached(lambda: profiles.promised_bytes == 6_000 * MEMORY_PER_BYTE)
    assert isinstance(await put(pair.target.address, [start(1_000), piece(b"x" * 1_000)]), BusyError)
    with profiles.room(6_000, "anna"):
        pass
    half.cancel()
    await asyncio.gather(half, return_exceptions=True)
    await reached(lambda: profiles.promised_bytes == 0)
    assert isinstance(await put(pair.target.address, [start(9), piece(b"x" * 8)]), TruncatedError)


async def test_a_stream_that_brings_nothing_for_long_is_ended(random_lm):
    service = ReceiverService(Receiver(random_lm("qwen2", "bfloat16")), ReceiverSettings(idle_s=0.05))

    async def stalls():
        yield b"x"
        await asyncio.sleep(HANGS_S)

    with pytest.raises(TruncatedError, match="brought nothing for"):
        await service.put_profile(b"d" * 16, 100, stalls(), Caller())
    assert service._receiver.profiles.promised_bytes == 0


async def test_a_receiver_that_names_another_digest_is_not_believed(tiny):
    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        while await context.read() is not grpc.aio.EOF:
            pass
        yield receiver_pb2.PutProfileResponse(digest=b"x" * 16).SerializeToString()

    server, port = await serve(answers)
    async with ReceiverClient(f"127.0.0.1:{port}") as peer:
        with pytest.raises(RemoteProtocolError, match=f"took the profile {tiny.profile.digest.hex()} for"):
            await peer.put_profile(tiny.profile.to_bytes())
    await server.stop(0)
