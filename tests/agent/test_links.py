"""One protocol whatever carries it: gRPC, a handler in this process, a file. Cuts at every frame, lies, two ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import SenderSettings
from kvlink.errors import ConfigError, InputError, PeerUnavailableError, RemoteProtocolError, TruncatedError
from kvlink.receipt import Capabilities
from kvlink.transport.api import Caller, Delivery, Fetch, FrameSource, PushStatus
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.file import FileLink
from kvlink.transport.link import PushLink
from kvlink.transport.memory import MemoryStream, ReceiverLink, SenderLink
from kvlink.transport.server import Server
from tests.agent.conftest import QUESTION, TEXT, answer
from tests.agent.test_fetch import LIES as FRAMES

ID = b"0123456789abcdef"
KINDS = ("memory", "grpc")


@pytest.fixture(scope="module")
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"), chunk_bytes=4096)


@pytest.fixture(scope="module")
def frames(sender) -> tuple[bytes, ...]:
    return sender.pack(sender.read(TEXT), QUESTION, "raw", transfer_id=ID).frames


@asynccontextmanager
async def link_to(kind: str, **handler: Any) -> AsyncIterator[Any]:
    """A link of a kind to `receiver=` or `sender=`."""
    (role,) = handler
    if kind == "memory":
        yield {"receiver": ReceiverLink, "sender": SenderLink}[role](handler[role])
        return
    server = Server("127.0.0.1:0", **handler)
    port = await server.start()
    async with {"receiver": ReceiverClient, "sender": SenderClient}[role](f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(0)


async def pushed(link: PushLink, frames: Sequence[bytes] | FrameSource) -> tuple[list[int], PushStatus]:
    """Numbers of the frames that left, and the last status."""
    items = [item async for item in link.push(frames)]
    return [item for item in items if isinstance(item, int)], [i for i in items if isinstance(i, PushStatus)][
        -1
    ]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_push_is_told_of_and_complete(sender, frames, kind):
    service = ReceiverService(Receiver(sender.lm))
    async with link_to(kind, receiver=service) as link:
        assert (await link.capabilities()).fingerprint == sender.lm.fingerprint
        sent, last = await pushed(link, frames)
        assert sent == [*range(1, len(frames))]
        assert (last.state, last.next_sequence) == ("complete", len(frames))
        assert await pushed(link, frames) == ([], last), "what is there is not sent again"
    assert await answer(service, last.cache_id)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_push_that_is_left_after_any_frame_goes_on_there(sender, frames, kind):
    """Memory cuts at each frame, sockets at a few."""
    service, expected = ReceiverService(Receiver(sender.lm)), None
    for cut in range(1, len(frames) - 1, 1 if kind == "memory" else 9):
        async with link_to(kind, receiver=service) as link:
            async with aclosing(link.push(frames)) as told:
                async for item in told:
                    if item == cut:
                        break
            sent, last = await pushed(link, frames)
            assert last.state == "complete"
            assert sent == [*range(sent[0], len(frames))]
            assert sent[0] <= cut + 1
        found = await answer(service, last.cache_id)
        expected = expected or found
        assert found == expected
        service.delete_cache(last.cache_id)


class Late:
    """A source that knows its last frame for the last one only once the receiver has said complete."""

    def __init__(self, frames: Sequence[bytes], service: ReceiverService) -> None:
        self._frames, self._service = frames, service
        self.count: int | None = None

    async def frame(self, number: int) -> bytes | None:
        if number < len(self._frames):
            return self._frames[number]
        while not len(self._service.store):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        self.count = len(self._frames)
        return None


async def test_a_receiver_that_is_faster_than_the_end_of_the_packing_is_believed(sender, frames):
    service = ReceiverService(Receiver(sender.lm))
    async with link_to("memory", receiver=service) as link:
        _, last = await pushed(link, Late(frames, service))
    assert last.state == "complete"


class CutStream(MemoryStream):
    """A stream in memory that breaks after so many frames."""

    def __init__(self, handler: Any, caller: Caller, after: int) -> None:
        super().__init__(handler, caller)
        self._left, self._broken = after, asyncio.Event()
        self.carried = 0

    async def write(self, frame: bytes) -> bool:
        self._left -= 1
        if self._left < 0:
            self._broken.set()
            return False
        self.carried += len(frame)
        return await super().write(frame)

    async def statuses(self) -> AsyncIterator[PushStatus]:
        statuses, broken = super().statuses(), asyncio.create_task(self._broken.wait())
        async with aclosing(statuses):
            while True:
                told = asyncio.ensure_future(anext(statuses, None))
                await asyncio.wait({told, broken}, return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    told.cancel()
                    await asyncio.gather(told, return_exceptions=True)
                    raise PeerUnavailableError("memory: cut")
                if (status := told.result()) is None:
                    return
                yield status


class CutLink(ReceiverLink):
    """A link in memory whose every stream breaks after `after` frames."""

    def __init__(self, handler: Any, caller: Caller, after: int, streams: list[CutStream]) -> None:
        super().__init__(handler, caller)
        self._after, self._streams = after, streams

    def _stream(self, caller: Caller) -> MemoryStream:
        self._streams.append(CutStream(self._handler, caller, self._after))
        return self._streams[-1]


async def test_a_delivery_over_a_link_that_breaks_again_and_again_arrives(sender):
    """What has arrived is not sent again: of each stream the first frame comes twice, and what was in flight."""
    receiver, streams = ReceiverService(Receiver(sender.lm)), list[CutStream]()
    service = SenderService(
        sender, SenderSettings(retry_pause_s=0.0),
        dial=lambda _address, caller, _patience_s=0.0: CutLink(receiver, caller, 8, streams),
    )  # fmt: skip
    *_, done = [p async for p in service.deliver_cache(Delivery("127.0.0.1:9", QUESTION, "raw", text=TEXT))]
    assert done.done
    assert len(streams) > 4
    carried = sum(stream.carried for stream in streams)
    assert carried < 1.7 * done.receipt.wire_bytes
    assert "grpc" not in done.receipt.bytes, "no link but gRPC adds its bytes"
    assert await answer(receiver, done.cache_id)


class Lying:
    """A receiver that says these statuses once it has the manifest, and takes what comes."""

    def __init__(self, honest: ReceiverService, statuses: Sequence[PushStatus]) -> None:
        self._honest, self._statuses = honest, statuses

    def capabilities(self) -> Capabilities:
        return self._honest.capabilities()

    async def push_cache(self, frames: AsyncIterator[bytes], caller: Caller) -> AsyncIterator[PushStatus]:
        await anext(frames)
        for status in self._statuses:
            yield status


LIES: dict[str, list[PushStatus]] = {
    "nothing": [],
    "an end at once": [PushStatus("complete", 9, "c")],
    "frames that do not exist": [PushStatus("accepted", 10**6)],
    "kept before it accepts": [PushStatus("durable", 1)],
    "kept what was not sent": [PushStatus("accepted", 1), PushStatus("durable", 10**6)],
    "complete without a cache": [PushStatus("accepted", 1), PushStatus("complete", 9)],
    "failed in a stream": [PushStatus("failed", 0)],
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("kind", ["memory"])
async def test_a_receiver_that_lies_is_not_believed(sender, frames, kind, name):
    liar = Lying(ReceiverService(Receiver(sender.lm)), LIES[name])
    async with link_to(kind, receiver=liar) as link:
        with pytest.raises(RemoteProtocolError, match="memory: "):
            _ = [item async for item in link.push(frames, fresh=True)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pull_brings_what_a_push_brings(sender, kind):
    service = SenderService(sender)
    published = await service.publish(TEXT, 0, [])
    async with link_to(kind, sender=service) as link:
        found = [f async for f in link.fetch(Fetch(published.context_id, QUESTION, "raw", transfer_id=ID))]
    read = Receiver(sender.lm).receive(found)
    assert read.receipt.context_tokens == published.context_tokens
    whole = sender.pack(sender.read(TEXT), QUESTION, "raw", transfer_id=ID).frames
    assert found == list(whole)


class Frames:
    """A sender that sends these frames, whatever it is asked for."""

    def __init__(self, frames: Iterable[bytes]) -> None:
        self._frames = frames

    async def fetch_cache(self, fetch: Fetch, caller: Caller) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame


@pytest.mark.parametrize("name", FRAMES)
async def test_what_is_no_transfer_ends_a_pull_at_its_first_frame(frames, name):
    """The table of a fetch over gRPC, in memory."""
    lie, error, most = FRAMES[name]
    got = []
    with pytest.raises(error):
        async for frame in SenderLink(Frames(lie(list(frames)))).fetch(
            Fetch("c", QUESTION, "raw", transfer_id=ID)
        ):
            got.append(frame)
    assert len(got) <= min(most, len(frames))


async def test_a_file_is_a_link_too(frames, tmp_path, sender):
    path = tmp_path / "context.kvl"
    with path.open("wb") as file:
        sent, last = await pushed(FileLink(file, "context.kvl"), frames)
    assert sent == [*range(len(frames))]
    assert (last.state, last.cache_id) == ("complete", "context.kvl")
    with path.open("rb") as file:
        assert [frame async for frame in FileLink(file).fetch(Fetch(""))] == list(frames)
    with path.open("rb") as file:
        assert Receiver(sender.lm).read_file(file).cache.tokens
    with path.open("rb") as file, pytest.raises(InputError, match="a file has one transfer"):
        _ = [frame async for frame in FileLink(file).fetch(Fetch("", QUESTION))]
    path.write_bytes(path.read_bytes()[:-100])
    with path.open("rb") as file, pytest.raises(TruncatedError, match="file: frame"):
        _ = [frame async for frame in FileLink(file).fetch(Fetch(""))]


async def test_a_sender_that_was_given_no_dial_says_so(sender):
    with pytest.raises(ConfigError, match="dials nobody; it can be fetched from"):
        _ = [
            p async for p in SenderService(sender).deliver_cache(Delivery("127.0.0.1:9", QUESTION, text=TEXT))
        ]
