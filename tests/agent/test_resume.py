"""Transfers that break: continued where they broke, by whoever began them, across restarts; ended once."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import replace

import pytest
import torch

from kvlink.agent.receiver import Intake, Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.agent.staging import Staging
from kvlink.errors import (
    BusyError,
    DeadlineError,
    NotFoundError,
    PeerUnavailableError,
    RemoteProtocolError,
    TruncatedError,
)
from kvlink.transport.api import Ask, Delivery, Fetch, PushStatus
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server
from tests.agent.conftest import QUESTION, TEXT, answer, feed
from tests.limits import HANGS_S
from tests.relay import relay

ID = b"0123456789abcdef"


@pytest.fixture
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"), chunk_bytes=4096)


@pytest.fixture
def frames(sender) -> tuple[bytes, ...]:
    return sender.pack(sender.read(TEXT), QUESTION, "raw", transfer_id=ID).frames


@pytest.fixture
def staged(tmp_path) -> ReceiverSettings:
    return ReceiverSettings(staging=tmp_path / "in")


async def test_every_cut_point_resumes_after_a_restart_of_the_receiver(sender, frames, staged):
    """The first life takes n frames and is gone; the second one takes only those that are missing."""
    expected = None
    for cut in range(1, len(frames) + 1):
        await feed(ReceiverService(Receiver(sender.lm), staged), frames[:cut])
        second = ReceiverService(Receiver(sender.lm), staged)
        first, *_ = await feed(second, frames[:1])
        # What was on disk is not asked for again; what was in flight may be.
        assert 1 <= first.next_sequence <= cut
        (*_, last) = await feed(second, [frames[0], *frames[first.next_sequence :]])
        assert last.state == "complete"
        found = await answer(second, last.cache_id)
        expected = expected or found
        assert found == expected
        second.delete_cache(last.cache_id)
        assert not list(staged.staging.iterdir()), "a deleted cache leaves nothing on disk"


async def test_what_was_told_durable_is_never_asked_for_again(sender, staged):
    staged = replace(staged, durable_bytes=10_000)
    frames = sender.pack(sender.read(TEXT), QUESTION, "raw", transfer_id=ID).frames
    for cut in range(3, len(frames)):
        first = await feed(ReceiverService(Receiver(sender.lm), staged), frames[:cut])
        durable = max([status.next_sequence for status in first if status.state == "durable"], default=1)
        second = ReceiverService(Receiver(sender.lm), staged)
        (resumed, *_) = await feed(second, frames[:1])
        assert resumed.next_sequence >= durable
        await second.cancel_transfer(ID)


async def test_a_complete_cache_outlives_a_restart(sender, frames, staged):
    first = ReceiverService(Receiver(sender.lm), staged)
    (*_, done) = await feed(first, frames)
    expected = await answer(first, done.cache_id)
    second = ReceiverService(Receiver(sender.lm), staged)
    assert await answer(second, done.cache_id) == expected
    (again,) = await feed(second, frames)
    assert (again.state, again.cache_id) == ("complete", done.cache_id), "nothing is sent twice"


async def test_an_expired_cache_is_gone_from_disk_too(sender, frames, staged):
    settings = replace(staged, cache_lifetime_s=0.05)
    service = ReceiverService(Receiver(sender.lm), settings)
    (*_, done) = await feed(service, frames)
    assert list(staged.staging.iterdir())
    await asyncio.sleep(0.1)
    service.sweep()
    assert not list(staged.staging.iterdir())
    with pytest.raises(NotFoundError):
        await answer(service, done.cache_id)


async def test_a_restart_finds_what_has_expired_and_removes_it(sender, frames, staged):
    await feed(ReceiverService(Receiver(sender.lm), staged), frames[:5])
    ReceiverService(Receiver(sender.lm), replace(staged, resume_lifetime_s=0.0))
    assert not list(staged.staging.iterdir())


@pytest.mark.parametrize("damage", ["tail", "flip", "empty", "notes"])
async def test_damaged_files_are_never_trusted(sender, frames, staged, damage):
    """A crash or a bad disk: the transfer goes on from what still holds, or from its beginning."""
    await feed(ReceiverService(Receiver(sender.lm), staged), frames[:9])
    (file,) = staged.staging.glob("*.kvl")
    data = bytearray(file.read_bytes())
    if damage == "tail":
        data = data[:-100]
    elif damage == "flip":
        data[-200] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        file.with_suffix(".json").write_text("{")
    file.write_bytes(data)
    second = ReceiverService(Receiver(sender.lm), staged)
    (*_, last) = await feed(second, frames)
    if last.state != "complete":  # it wanted to go on further back or forth than these frames do
        (*_, last) = await feed(second, [frames[0], *frames[last.next_sequence :]])
    assert last.state == "complete"
    plain = ReceiverService(Receiver(sender.lm))
    (*_, reference) = await feed(plain, frames)
    assert await answer(second, last.cache_id) == await answer(plain, reference.cache_id)


async def test_files_are_readable_by_their_owner_only(sender, frames, staged):
    await feed(ReceiverService(Receiver(sender.lm), staged), frames[:5])
    assert {path.stat().st_mode & 0o077 for path in staged.staging.iterdir()} == {0}


async def test_a_stream_that_dies_under_the_last_frame_has_not_been_in_vain(sender, frames, monkeypatch):
    """The cache was complete when nobody listened any more: who asks again gets it at once."""
    service = ReceiverService(Receiver(sender.lm))
    restore, restoring = Intake.hold, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(self):
        loop.call_soon_threadsafe(restoring.set)
        time.sleep(0.2)
        return restore(self)

    monkeypatch.setattr(Intake, "hold", slowly)
    task = asyncio.create_task(feed(service, frames))
    await restoring.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (done,) = await feed(service, frames[:1])
    assert done.state == "complete"
    assert await answer(service, done.cache_id) is not None


async def test_a_full_disk_loses_nothing(sender, frames, staged, monkeypatch):
    """The sender is told to come again, and goes on where it was once there is room."""
    service = ReceiverService(Receiver(sender.lm), replace(staged, durable_bytes=10_000))
    full = True
    sync = os.fdatasync

    def fdatasync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    await feed(service, frames[:1])
    monkeypatch.setattr("kvlink.agent.staging.os.fdatasync", fdatasync)
    with pytest.raises(BusyError, match="No space left on device"):
        await feed(service, frames)
    full = False
    (begun, *_) = await feed(service, frames[:1])
    (*_, done) = await feed(service, [frames[0], *frames[begun.next_sequence :]])
    assert done.state == "complete"
    second = ReceiverService(Receiver(sender.lm), staged)
    assert await answer(second, done.cache_id) == await answer(service, done.cache_id), "the file is whole"


def test_a_full_folder_says_when_to_come_again(tmp_path):
    staging = Staging(tmp_path, max_bytes=1000)
    staging.begin(ID, {}).add(b"x" * 480)
    with pytest.raises(BusyError, match="at most 1000 are held here"):
        staging.begin(b"1" * 16, {})
    staging.forget(ID)
    staging.begin(b"1" * 16, {}).close()


class TestEnds:
    """Every transfer ends once: complete, failed or cancelled."""

    async def test_a_replay_of_a_complete_transfer_changes_nothing(self, sender, frames):
        service = ReceiverService(Receiver(sender.lm))
        (*_, done) = await feed(service, frames)
        (again,) = await feed(service, frames)
        assert (again.state, again.cache_id) == ("complete", done.cache_id)
        assert len(service.store) == 1

    async def test_a_failed_transfer_stays_failed(self, sender, frames):
        service = ReceiverService(Receiver(sender.lm))
        with pytest.raises(RemoteProtocolError, match="expected sequence 1, found 2"):
            await feed(service, [frames[0], frames[2]])
        status = await service.transfer_status(ID)
        assert status.state == "failed"
        assert "expected sequence 1" in status.why
        with pytest.raises(RemoteProtocolError, match="has failed: .* needs an id of its own"):
            await feed(service, frames)
        assert service.store.reserved_bytes == 0, "and it holds no memory"

    async def test_a_cancelled_transfer_is_free_at_once(self, sender, frames, staged):
        service = ReceiverService(Receiver(sender.lm), staged)
        await feed(service, frames[:5])
        assert service.store.reserved_bytes > 0
        await service.cancel_transfer(ID)
        assert service.store.reserved_bytes == 0
        assert not list(staged.staging.iterdir())
        assert (await service.transfer_status(ID)).state == "cancelled"
        with pytest.raises(RemoteProtocolError, match="has cancelled"):
            await feed(service, frames)

    async def test_cancelling_does_not_touch_what_is_complete(self, sender, frames):
        service = ReceiverService(Receiver(sender.lm))
        (*_, done) = await feed(service, frames)
        await service.cancel_transfer(ID)
        assert await answer(service, done.cache_id) is not None

    @pytest.mark.parametrize(
        ("limits", "why"),
        [
            ({"resume_lifetime_s": -1.0}, "not resumed within"),
            ({"transfer_deadline_s": -1.0}, "not complete within"),
        ],
    )
    async def test_what_nobody_resumes_fails(self, sender, frames, limits, why):
        service = ReceiverService(Receiver(sender.lm))
        await feed(service, frames[:5])
        service.inbound.settings = replace(service.settings, **limits)
        service.sweep()
        status = await service.transfer_status(ID)
        assert status.state == "failed"
        assert why in status.why
        assert service.store.reserved_bytes == 0

    @pytest.mark.parametrize(
        ("limits", "error", "why"),
        [
            ({"transfer_deadline_s": 0.1}, DeadlineError, "not complete within"),
            ({"idle_s": 0.1}, TruncatedError, "brought nothing for"),
        ],
    )
    async def test_a_stream_that_brings_nothing_is_ended_by_the_clock(
        self, sender, frames, limits, error, why
    ):
        """Which of its waits comes first is the table's business; here that somebody looks at the clock."""
        service = ReceiverService(Receiver(sender.lm), ReceiverSettings(**limits))

        async def stalls():
            for frame in frames[:4]:
                yield frame
            await asyncio.Event().wait()

        with pytest.raises(error, match=why):
            [status async for status in service.push_cache(stalls())]
        if error is TruncatedError:
            (*_, done) = await feed(service, [frames[0], *frames[4:]])
            assert done.state == "complete"

    async def test_two_streams_at_once_give_one_cache(self, sender, frames):
        service = ReceiverService(Receiver(sender.lm))

        async def push() -> list[PushStatus]:
            accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

            async def stream():
                yield frames[0]
                for frame in frames[await accepted :]:  # from where this stream was told
                    yield frame

            statuses = []
            async for status in service.push_cache(stream()):
                statuses.append(status)
                if not accepted.done():
                    accepted.set_result(status.next_sequence)
            return statuses

        found = await asyncio.gather(*(push() for _ in range(3)), return_exceptions=True)
        ends = [statuses[-1] for statuses in found if isinstance(statuses, list) and statuses]
        done = {status.cache_id for status in ends if status.state == "complete"}
        assert len(done) == 1
        assert len(service.store) == 1


async def serve(handler, port: int = 0) -> tuple[Server, int]:
    server = Server(f"127.0.0.1:{port}", **handler)
    return server, await server.start()


async def test_a_delivery_goes_on_after_a_restart_of_the_sender_without_packing_again(sender, tmp_path):
    """Its caller only asks again. What was packed is on disk, what has arrived stays."""
    receiver = ReceiverService(Receiver(sender.lm))
    target, target_port = await serve({"receiver": receiver})
    settings = SenderSettings(staging=tmp_path / "out", attempts=1)
    first = SenderService(sender, settings, dial=to_receivers())
    async with relay(target_port, cut_after=60_000, cut_always=True, rate_bps=3e6) as wire:
        delivery = Delivery(f"127.0.0.1:{wire.port}", QUESTION, "raw", text=TEXT, delivery_id=ID)
        with pytest.raises(PeerUnavailableError):
            [p async for p in first.deliver_cache(delivery)]
        assert (await receiver.transfer_status(ID)).next_sequence > 5
        wire._cut_after = 0
        begun = len(wire.seen)
        second = SenderService(Sender(sender.lm, chunk_bytes=4096), settings, dial=to_receivers())
        second._sender.pack = None  # type: ignore[assignment,method-assign]
        last = [p async for p in second.deliver_cache(delivery)][-1]
        assert last.done
        again = len(wire.seen) - begun
        assert again < last.receipt.wire_bytes - 40_000, "what has arrived is not sent again"
    assert await answer(receiver, last.cache_id)
    await target.stop(0)


async def test_a_sender_whose_staged_file_is_damaged_packs_again(sender, tmp_path):
    receiver = ReceiverService(Receiver(sender.lm))
    target, port = await serve({"receiver": receiver})
    settings = SenderSettings(staging=tmp_path)
    delivery = Delivery(f"127.0.0.1:{port}", QUESTION, "raw", text=TEXT, delivery_id=ID)
    [p async for p in SenderService(sender, settings, dial=to_receivers()).deliver_cache(delivery)]
    (file,) = tmp_path.glob("*.kvl")
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    second = SenderService(sender, settings, dial=to_receivers())
    last = [p async for p in second.deliver_cache(delivery)][-1]
    assert last.done
    assert await answer(receiver, last.cache_id)
    await target.stop(0)


async def test_another_request_under_the_same_name_is_refused(pair):
    delivery = Delivery(pair.target.address, QUESTION, "raw", text=TEXT, delivery_id=ID)
    [p async for p in pair.source.deliver(delivery)]
    with pytest.raises(RemoteProtocolError, match="belongs to another request"):
        [p async for p in pair.source.deliver(replace(delivery, question="Who else?"))]


async def test_a_caller_whose_link_breaks_gets_the_same_delivery(pair):
    sender_port = int(pair.source.address.rpartition(":")[2])
    async with relay(sender_port) as wire, SenderClient(f"127.0.0.1:{wire.port}") as source:
        delivery = Delivery(pair.target.address, QUESTION, "raw", text=TEXT, delivery_id=ID)
        packed = 0
        pack = pair.sender._sender.pack

        def counting(*arguments, **options):
            nonlocal packed
            packed += 1
            wire.cut()  # the caller's connection breaks while the sender is at work
            return pack(*arguments, **options)

        pair.sender._sender.pack = counting
        try:
            last = [p async for p in source.deliver(delivery)][-1]
        finally:
            del pair.sender._sender.pack
    assert last.done
    assert packed == 1


async def test_leaving_a_delivery_early_frees_memory_at_both_ends(pair):
    pair.sender._sender.chunk_bytes = 4096
    async with relay(pair.receiver_port, stall_after=30_000) as wire:
        delivery = Delivery(f"127.0.0.1:{wire.port}", QUESTION, "raw", text=TEXT, delivery_id=ID)
        progress = pair.source.deliver(delivery)
        async for told in progress:
            if told.sent_bytes > 10_000:
                break
        await progress.aclose()
        wire.go()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if not len(pair.sender.outbox) and not pair.receiver.store.reserved_bytes:
                break
        assert len(pair.sender.outbox) == 0
        assert pair.receiver.store.reserved_bytes == 0
        assert (await pair.target.transfer_status(ID)).state == "cancelled"


async def test_a_broken_fetch_goes_on_at_the_next_frame(pair):
    pair.sender._sender.chunk_bytes = 4096
    published = await pair.source.publish(TEXT)
    sender_port = int(pair.source.address.rpartition(":")[2])
    async with relay(sender_port, cut_back_after=30_000) as wire:
        async with SenderClient(f"127.0.0.1:{wire.port}") as source:
            frames = [f async for f in source.fetch(Fetch(published.context_id, QUESTION, "raw"))]
        assert wire.cuts == 1
        assert len(wire.came) < 1.5 * sum(map(len, frames)), "what has arrived is not sent again"
    receiver = Receiver(pair.receiver._receiver.lm)
    assert receiver.answer(receiver.receive(frames), QUESTION).text is not None


async def test_a_peer_that_falls_silent_is_noticed_in_seconds(pair, monkeypatch):
    monkeypatch.setattr("kvlink.transport.channel.QUIET_S", 0.5)
    monkeypatch.setattr("kvlink.transport.calls.BEAT_S", 0.1)
    pair.sender._sender.chunk_bytes = 4096
    frames = pair.sender._sender.pack(pair.sender._sender.read(TEXT), QUESTION, "raw").frames
    async with (
        relay(pair.receiver_port, stall_after=30_000) as wire,
        ReceiverClient(f"127.0.0.1:{wire.port}") as target,
        asyncio.timeout(HANGS_S),
    ):
        with pytest.raises(PeerUnavailableError, match="no sign of life"):
            [item async for item in target.push(frames)]


async def test_a_sender_that_packs_for_long_is_waited_for(pair, monkeypatch):
    """A fetch has signs of life too, so that the client's clock for silence can run in it."""
    monkeypatch.setattr("kvlink.transport.calls.BEAT_S", 0.1)
    monkeypatch.setattr("kvlink.transport.channel.QUIET_S", 0.5)
    published = await pair.source.publish(TEXT)
    pack = pair.sender._sender.pack

    def slowly(*arguments, **options):
        time.sleep(1.2)
        return pack(*arguments, **options)

    monkeypatch.setattr(pair.sender._sender, "pack", slowly)
    frames = [f async for f in pair.source.fetch(Fetch(published.context_id, QUESTION, "raw"))]
    receiver = Receiver(pair.receiver._receiver.lm)
    assert receiver.receive(frames).cache.tokens == published.context_tokens


async def test_a_sender_that_falls_silent_under_a_fetch_is_noticed(pair, monkeypatch):
    monkeypatch.setattr("kvlink.transport.channel.QUIET_S", 0.3)
    monkeypatch.setattr("kvlink.transport.channel.ATTEMPTS", 1)
    pair.sender._sender.chunk_bytes = 4096
    published = await pair.source.publish(TEXT)
    sender_port = int(pair.source.address.rpartition(":")[2])
    async with (
        relay(sender_port) as wire,
        SenderClient(f"127.0.0.1:{wire.port}") as source,
        asyncio.timeout(HANGS_S),
    ):
        with pytest.raises(PeerUnavailableError, match="no sign of life"):
            async for _ in source.fetch(Fetch(published.context_id, QUESTION, "raw")):
                wire.stall()


async def test_a_frame_that_takes_long_on_a_slow_line_is_waited_for(pair, monkeypatch):
    """Signs of life wait behind the bulk: what comes on the connection is one."""
    monkeypatch.setattr("kvlink.transport.calls.BEAT_S", 0.1)
    monkeypatch.setattr("kvlink.transport.channel.QUIET_S", 0.4)
    published = await pair.source.publish(TEXT)
    sender_port = int(pair.source.address.rpartition(":")[2])
    whole = [f async for f in pair.source.fetch(Fetch(published.context_id, QUESTION, "raw"))]
    slow_bps = 8 * max(map(len, whole)) / 1.0
    async with (
        relay(sender_port, rate_back_bps=slow_bps) as wire,
        SenderClient(f"127.0.0.1:{wire.port}") as source,
    ):
        frames = [f async for f in source.fetch(Fetch(published.context_id, QUESTION, "raw"))]
    assert frames[1:-2] == whole[1:-2]


async def test_a_slow_receiver_that_lives_is_waited_for(pair, monkeypatch):
    """Signs of life come while the work takes longer than the quiet that is allowed."""
    monkeypatch.setattr("kvlink.transport.calls.BEAT_S", 0.1)
    monkeypatch.setattr("kvlink.transport.channel.QUIET_S", 0.5)
    restore = pair.receiver._receiver.generate

    def slowly(*arguments, **options):
        import time

        time.sleep(1.2)
        return restore(*arguments, **options)

    done = await pair.deliver("raw")
    monkeypatch.setattr(pair.receiver._receiver, "generate", slowly)
    assert await pair.answer(done.cache_id) is not None


async def test_a_cache_that_expires_under_a_generation_is_wiped_after_it(pair):
    done = await pair.deliver("raw")
    expected = await pair.answer(done.cache_id)
    held = pair.receiver.store.get(done.cache_id)
    pieces = pair.receiver.generate(Ask(done.cache_id, QUESTION))
    text = (await anext(pieces)).text
    pair.receiver.delete_cache(done.cache_id)
    assert torch.any(held.cache.layers[0].keys != 0)
    text += "".join([piece.text async for piece in pieces])
    assert text.strip() == expected, "the answer is whole"
    assert all(not torch.any(layer.keys) and not torch.any(layer.values) for layer in held.cache.layers)


async def test_who_leaves_after_the_end_has_cut_nothing(sender, frames, caplog):
    caplog.set_level("INFO")
    service = ReceiverService(Receiver(sender.lm))

    async def stream():
        for frame in frames:
            yield frame

    statuses = service.push_cache(stream())
    async for status in statuses:
        if status.state == "complete":
            break
    await statuses.aclose()
    said = [record.message for record in caplog.records]
    assert any(line.startswith("transfer complete") for line in said)
    assert not any("cut" in line for line in said)
