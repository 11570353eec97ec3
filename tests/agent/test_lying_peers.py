"""What an agent answers is checked like what a caller asks: no lie is believed, none reaches a receipt or a metric."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from kvlink.errors import KvlinkError, RemoteProtocolError
from kvlink.transport import convert
from kvlink.transport.api import Ask, Delivery
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.agent.conftest import QUESTION, TEXT
from tests.agent.lying import SENDER, serve

ACCEPTED, DURABLE, COMPLETE = (
    receiver_pb2.TRANSFER_STATE_ACCEPTED, receiver_pb2.TRANSFER_STATE_DURABLE, receiver_pb2.TRANSFER_STATE_COMPLETE,
)  # fmt: skip


def status(state: int, number: int = 1, cache_id: str = "", **receipt: Any) -> bytes:
    told = receiver_pb2.PushCacheResponse(state=state, next_sequence=number, cache_id=cache_id)
    for name, value in receipt.items():
        if isinstance(value, dict):
            getattr(told.receipt, name).update(value)
        else:
            setattr(told.receipt, name, value)
    return told.SerializeToString()


def complete(**receipt: Any) -> list[bytes]:
    return [status(COMPLETE, 9, "c", **receipt)]


BEFORE_FRAMES = {
    "a frame beyond the transfer": [status(ACCEPTED, 2**62)],
    "a state that nobody knows": [
        receiver_pb2.PushCacheResponse(state=77, next_sequence=1).SerializeToString()
    ],  # type: ignore[arg-type]
    "no state": [receiver_pb2.PushCacheResponse(next_sequence=1).SerializeToString()],
    "complete, and nothing was sent": [status(ACCEPTED, 1), *complete()],
    "bytes that are no message": [b"\xff\xff\xff"],
    "a cache id of a megabyte": [status(ACCEPTED, 1, "x" * 1_000_000)],
}
AFTER_FRAMES = {
    "50,000 stages": complete(stage_s={f'x{i}"}} 1\nkvlink_forged 666\n#': 1.0 for i in range(50_000)}),
    "a stage of its own": complete(stage_s={"dream": 1.0}),
    "a kind of bytes of its own": complete(bytes={"dream": 1}),
    **{f"a stage of {s} s": complete(stage_s={"decode": s}) for s in (math.nan, math.inf, -1.0, 1e300)},
    "bits that are none": complete(bits_per_element=math.nan),
    "more kept than there is": complete(context_tokens=1, kept_tokens=2),
    "a recipe of a megabyte": complete(recipe="x" * 1_000_000),
    "an id with escapes": [status(COMPLETE, 9, "\x1b[2J")],
    "no cache": [status(COMPLETE, 9)],
    "kept what was not sent": [status(DURABLE, 10_000)],
}  # fmt: skip


def liar(pair, *, first: list[bytes], then: list[bytes]) -> Callable[[str, Any], AsyncIterator[bytes]]:
    """A receiver that is honest about itself, says `first`, and when all frames have come `then`."""
    told = convert.capabilities_to_proto(pair.receiver.capabilities())
    capabilities = common_pb2.GetCapabilitiesResponse(capabilities=told).SerializeToString()

    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        if method == "GetCapabilities":
            yield capabilities
        if method == "PushCache":
            for message in first:
                yield message
            if then:
                while await context.read() is not grpc.aio.EOF:
                    pass
                for message in then:
                    yield message

    return answers


async def ended(pair, answers: Callable[[str, Any], AsyncIterator[bytes]]) -> KvlinkError | None:
    server, port = await serve(answers)
    try:
        await pair.deliver("raw", receiver=f"127.0.0.1:{port}")
    except KvlinkError as error:
        return error
    finally:
        await server.stop(0)
    return None


@pytest.mark.parametrize("name", BEFORE_FRAMES)
async def test_a_receiver_that_lies_before_it_takes_frames(pair, name):
    error = await ended(pair, liar(pair, first=BEFORE_FRAMES[name], then=[]))
    assert isinstance(error, RemoteProtocolError), error
    assert len(str(error)) < 2000


@pytest.mark.parametrize("name", AFTER_FRAMES)
async def test_a_receiver_that_lies_at_the_end(pair, name):
    error = await ended(pair, liar(pair, first=[status(ACCEPTED, 1)], then=AFTER_FRAMES[name]))
    assert isinstance(error, RemoteProtocolError), error
    assert len(str(error)) < 2000


async def test_the_same_receiver_without_a_lie_is_believed(pair):
    """The counterpart: what is refused above is the lie, and only the receiver's own stages are taken from it."""
    told = complete(stage_s={"decode": 0.25, "encode": 1e5}, bytes={"codes": 7})
    server, port = await serve(liar(pair, first=[status(ACCEPTED, 1)], then=told))
    done = await pair.deliver("raw", receiver=f"127.0.0.1:{port}")
    await server.stop(0)
    assert done.cache_id == "c"
    assert done.receipt.stage_s["decode"] == 0.25
    assert done.receipt.stage_s["encode"] < 1e3
    assert done.receipt.bytes["codes"] > 7


CAPABILITIES: dict[str, Callable[[Any], object]] = {
    "a rate that is none": lambda c: setattr(c, "prefill_tokens_per_s", math.nan),
    "a dtype of its own": lambda c: setattr(c, "dtype", 77),
    "no dtype": lambda c: c.ClearField("dtype"),
    "a name of a megabyte": lambda c: setattr(c, "model_name", "x" * 1_000_000),
    "profiles without end": lambda c: c.profiles.extend([b"x" * 16] * 100_000),
    "a profile's digest of 17 bytes": lambda c: c.profiles.append(b"x" * 17),
    "modes without end": lambda c: c.modes.extend([1] * 100_000),
    "a release with line ends": lambda c: setattr(c, "release", "1\n2"),
    "a fingerprint of 3 bytes": lambda c: setattr(c.fingerprint, "weights", b"abc"),
    "a sketch without end": lambda c: c.sketch.numbers.extend([1] * 100_000),
}


@pytest.mark.parametrize("name", CAPABILITIES)
async def test_what_an_agent_says_of_itself(pair, name):
    told = convert.capabilities_to_proto(pair.receiver.capabilities())
    CAPABILITIES[name](told)
    data = common_pb2.GetCapabilitiesResponse(capabilities=told).SerializeToString()

    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        yield data

    server, port = await serve(answers)
    async with ReceiverClient(f"127.0.0.1:{port}") as peer:
        with pytest.raises(
            RemoteProtocolError, match=f"127.0.0.1:{port}: GetCapabilitiesResponse.capabilities"
        ):
            await peer.capabilities()
    await server.stop(0)


def piece(text: str = "", tokens: int = 0, *, done: bool = False, **receipt: Any) -> bytes:
    return receiver_pb2.GenerateResponse(
        text=text,
        token_ids=range(tokens),
        done=done,
        receipt=common_pb2.Receipt(**receipt) if receipt else None,
    ).SerializeToString()


ANSWERS = {
    "more tokens than were asked for": [piece("a", 3), piece("a", 3), piece(done=True)],
    "a piece of megabytes": [piece("x" * 2_000_000, 1), piece(done=True)],
    "no end": [piece("a", 1)],
    "more after the end": [piece(done=True), piece("a", 1)],
    "a receipt with a time that is none": [piece(done=True, stage_s={"generate": math.inf})],
    "bytes that are no message": [b"\xff"],
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_receiver_that_lies_in_its_answer(name):
    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        for message in ANSWERS[name]:
            yield message

    server, port = await serve(answers)
    async with ReceiverClient(f"127.0.0.1:{port}") as peer:
        with pytest.raises(RemoteProtocolError):
            _ = [p async for p in peer.generate(Ask("c", QUESTION, max_new_tokens=5))]
    await server.stop(0)


def progress(sent: int = 0, total: int = 9, **more: Any) -> bytes:
    return sender_pb2.DeliverCacheResponse(sent_bytes=sent, total_bytes=total, **more).SerializeToString()


DELIVERIES = {
    "more than there is": [progress(10)],
    "another total": [progress(1), progress(2, 10)],
    "no end": [progress(9)],
    "done without a cache": [progress(9, done=True)],
    "more after the end": [progress(9, done=True, cache_id="c"), progress(9)],
    "an id with escapes": [progress(9, done=True, cache_id="\x1b]0;x\x07")],
    "an answer of megabytes": [progress(9, done=True, cache_id="c", sender_answer="x" * 5_000_000)],
    "an explanation that does not fit": [
        progress(9, done=True, cache_id="c", explanation=sender_pb2.Explanation(tokens=["a"], need=[1.0]))
    ],
    "needs that are none": [
        progress(9, done=True, cache_id="c",
                 explanation=sender_pb2.Explanation(tokens=["a"], need=[math.nan], kept=[1.0]))
    ],
    "a certificate of more than all tokens": [
        progress(9, done=True, cache_id="c", receipt=common_pb2.Receipt(
            certificate=common_pb2.Certificate(agreeing_tokens=3, tokens=2)))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DELIVERIES)
async def test_a_sender_that_lies_of_a_delivery(name):
    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        for message in DELIVERIES[name] if method == "DeliverCache" else [b""]:
            yield message

    server, port = await serve(answers, SENDER)
    async with SenderClient(f"127.0.0.1:{port}") as peer:
        with pytest.raises(RemoteProtocolError):
            _ = [p async for p in peer.deliver(Delivery("127.0.0.1:9", QUESTION, text=TEXT))]
    await server.stop(0)
