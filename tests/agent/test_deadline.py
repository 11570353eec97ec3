"""A deadline: what has closed by then is held and answered from, and the transfer has ended."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.settings import ReceiverSettings
from kvlink.errors import DeadlineError, RemoteProtocolError
from kvlink.transport.api import PushStatus
from kvlink.wire.session import ReceiveSession, SendSession, read_transfer
from tests.agent.conftest import QUESTION, TEXT, answer, feed

TIERS = "q2c@0.5 int8 rest=int2"
SOON_MS, LONG_MS = 300, 3_600_000


def closed_at(frames) -> list[int]:
    """For each segment the frames that it takes to close it."""
    session, found = ReceiveSession(keep=False), []
    for number, frame in enumerate(frames, 1):
        session.receive(frame)
        if len(session.closed) > len(found):
            found.append(number)
    return found


@pytest.fixture(scope="module")
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"), chunk_bytes=4096)


@pytest.fixture(scope="module")
def whole(sender) -> tuple[bytes, ...]:
    """Two segments."""
    return tuple(sender.pack(sender.read(TEXT), QUESTION, TIERS).frames)


def within(frames, deadline_ms: int) -> tuple[bytes, ...]:
    """The same transfer with a deadline."""
    manifest, segments = read_transfer(frames)
    return tuple(SendSession(replace(manifest, deadline_ms=deadline_ms), 4096).transfer(segments))


@pytest.fixture(scope="module")
def frames(whole) -> tuple[bytes, ...]:
    """Two segments, within a deadline that is soon over."""
    return within(whole, SOON_MS)


def service_of(sender: Sender, **settings) -> ReceiverService:
    return ReceiverService(Receiver(sender.lm), ReceiverSettings(**settings))


async def stalled(service: ReceiverService, frames) -> list[PushStatus]:
    """Push frames, then nothing more, over a stream that stays open."""

    async def stream():
        for frame in frames:
            yield frame
        await asyncio.Event().wait()

    return [status async for status in service.push_cache(stream())]


async def test_what_has_closed_by_the_deadline_is_held_and_answered_from(sender, frames):
    service, first = service_of(sender), closed_at(frames)[0]
    last = (await stalled(service, frames[: first + 2]))[-1]
    assert (last.state, last.next_sequence) == ("enough", first + 2)
    assert last.receipt.segments == 1
    assert last.receipt.kept_share == pytest.approx(0.5, abs=0.02)
    receiver = Receiver(sender.lm)
    expected = receiver.answer(receiver.receive(frames[:first], partial=True), QUESTION).text
    assert (await answer(service, last.cache_id)).strip() == expected
    assert service.store.reserved_bytes == service.inbound.gate.inside == 0


async def test_a_transfer_that_is_there_in_time_is_complete(sender, whole):
    assert (await feed(service_of(sender), within(whole, LONG_MS)))[-1].state == "complete"


async def test_with_nothing_closed_it_fails_and_says_what_came(sender, frames):
    service = service_of(sender)
    with pytest.raises(
        DeadlineError, match=r"deadline of 0.3 s has passed: 3 frames of [\d,]+ bytes came, no seg"
    ):
        await stalled(service, frames[:3])
    (transfer_id,) = service.inbound._ended
    assert (await service.transfer_status(transfer_id)).state == "failed"
    assert service.store.reserved_bytes == 0


async def test_who_resumes_after_enough_is_told_so_and_sends_nothing(sender, frames):
    service = service_of(sender)
    last = (await stalled(service, frames[:-2]))[-1]
    (again,) = await feed(service, frames)
    assert (again.state, again.cache_id, again.receipt) == ("enough", last.cache_id, last.receipt)
    assert len(service.store) == 1


async def test_a_deadline_that_comes_while_the_stream_is_broken_counts_too(sender, whole):
    """The sweep notices, or whoever resumes."""
    frames = within(whole, LONG_MS)
    service = service_of(sender)
    await feed(service, frames[: closed_at(frames)[0]])
    (transfer,) = service.inbound._transfers.values()
    assert transfer.life.state == "broken"
    transfer.life = replace(transfer.life, deadline_at=0.0)
    (again,) = await feed(service, frames)
    assert again.state == "enough"


async def test_enough_outlives_a_restart(sender, frames, tmp_path):
    settings = {"staging": tmp_path}
    first = service_of(sender, **settings)
    last = (await stalled(first, frames[: closed_at(frames)[0] + 2]))[-1]
    expected = await answer(first, last.cache_id)
    second = service_of(sender, **settings)
    assert await answer(second, last.cache_id) == expected
    (again,) = await feed(second, frames)
    assert (again.state, again.cache_id) == ("enough", last.cache_id)
    second.delete_cache(last.cache_id)
    assert not list(tmp_path.iterdir())


async def test_a_cache_that_is_gone_after_enough_is_taken_anew(sender, frames):
    service = service_of(sender)
    last = (await stalled(service, frames[:-2]))[-1]
    service.delete_cache(last.cache_id)
    (begun, *_) = await feed(service, frames[:1])
    assert (begun.state, begun.next_sequence) == ("accepted", 1)


class TestLies:
    async def test_a_deadline_beyond_an_hour_is_refused(self, sender, frames):
        with pytest.raises(RemoteProtocolError, match="deadline_ms"):
            await feed(service_of(sender), within(frames, LONG_MS + 1)[:1])

    async def test_a_text_has_no_deadline(self, sender):
        manifest, segments = read_transfer(sender.pack(sender.read(TEXT), "", "text").frames)
        hasty = next(SendSession(replace(manifest, deadline_ms=5)).transfer(segments))
        with pytest.raises(RemoteProtocolError, match="a text comes whole or not at all"):
            await feed(service_of(sender), [hasty])

    async def test_a_segment_that_does_not_close_gives_nothing(self, sender, frames):
        """All of its groups are there; only its digest is not."""
        with pytest.raises(DeadlineError, match="no segment has closed"):
            await stalled(service_of(sender), frames[: closed_at(frames)[0] - 1])
