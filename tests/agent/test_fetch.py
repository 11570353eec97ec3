"""A fetch takes a transfer and nothing else: the first frame that is none ends it, and no file is left."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlink.agent.sender import Sender
from kvlink.errors import DataError, KvlinkError, LimitError, RemoteProtocolError, TruncatedError
from kvlink.transport.api import Fetch
from kvlink.transport.client import SenderClient
from kvlink.v1 import sender_pb2
from kvlink.wire.session import ReceiveSession, SendSession, read_transfer
from tests.agent.conftest import QUESTION, TEXT
from tests.agent.lying import SENDER, serve
from tests.liar import capabilities

ID = b"t" * 16
UNKNOWN = b"\xfa\x01\x80\x10" + bytes(2048)
"""A field of 2 kB that no message has."""


@pytest.fixture(scope="module")
def frames(tiny) -> list[bytes]:
    """An honest transfer of many frames."""
    sender = Sender(tiny, chunk_bytes=4096)
    return list(sender.pack(sender.read(TEXT), QUESTION, "raw", transfer_id=ID).frames)


def message(frame: bytes) -> bytes:
    return sender_pb2.FetchCacheResponse(frame=frame).SerializeToString()


def forever(frame: bytes) -> Iterable[bytes]:
    return itertools.repeat(frame)


def turned(frame: bytes) -> bytes:
    return frame[:-9] + bytes([frame[-9] ^ 1]) + frame[-8:]


def huge(frames: list[bytes]) -> list[bytes]:
    """A manifest that declares more than anybody holds."""
    session = ReceiveSession()
    session.receive(frames[0])
    assert session.manifest is not None
    shape = replace(session.manifest.shape, layers=4096, kv_heads=4096)
    return [SendSession(replace(session.manifest, shape=shape)).open(), *frames[1:]]


def another(frames: list[bytes]) -> list[bytes]:
    """The manifest of a transfer that nobody asked for."""
    session = ReceiveSession()
    session.receive(frames[0])
    assert session.manifest is not None
    return [SendSession(replace(session.manifest, transfer_id=b"u" * 16)).open(), *frames[1:]]


LIES: dict[str, tuple[Callable[[list[bytes]], Iterable[bytes]], type[KvlinkError], int]] = {
    "zeros": (lambda _: forever(bytes(1_000_000)), RemoteProtocolError, 0),
    "nothing, again and again": (lambda _: forever(b""), RemoteProtocolError, 0),
    "a manifest again and again": (lambda f: forever(f[0]), RemoteProtocolError, 1),
    "a good beginning, then zeros": (lambda f: [*f[:3], *([bytes(1_000_000)] * 9)], RemoteProtocolError, 3),
    "a good beginning, then the same chunk": (lambda f: [*f[:3], *([f[2]] * 9)], RemoteProtocolError, 3),
    "a chunk with a bit turned": (lambda f: [*f[:4], turned(f[4]), *f[5:]], DataError, 4),
    "frames in another order": (lambda f: [*f[:3], f[4], f[3], *f[5:]], RemoteProtocolError, 3),
    "no end": (lambda f: f[:-1], TruncatedError, 10**6),
    "nothing at all": (lambda _: [], TruncatedError, 0),
    "a frame after the end": (lambda f: [*f, f[-1]], RemoteProtocolError, 10**6),
    "a frame of 5 MB": (lambda f: [f[0], f[1], f[2] + bytes(5_000_000)], LimitError, 2),
    "another transfer": (lambda f: another(f), RemoteProtocolError, 0),
    "much that nobody knows in a frame": (lambda f: [*f[:2], f[2] + UNKNOWN], RemoteProtocolError, 2),
    "more than anybody holds": (huge, LimitError, 0),
}  # fmt: skip


async def fetched(answer: Iterable[bytes]) -> tuple[int, Exception | None, int]:
    """Frames that a fetch handed out, how it ended, and frames that the sender got rid of."""
    sent = [0]

    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        for frame in answer:
            sent[0] += 1
            yield message(frame)
            await asyncio.sleep(0)

    server, port = await serve(answers, SENDER)
    got, ended = 0, None
    try:
        async with SenderClient(f"127.0.0.1:{port}") as source:
            async for _ in source.fetch(Fetch("c", QUESTION, "raw", transfer_id=ID)):
                got += 1
    except KvlinkError as error:
        ended = error
    finally:
        await server.stop(0)
    return got, ended, sent[0]


OVER_SOCKETS = (
    "zeros",
    "nothing, again and again",
    "no end",
    "nothing at all",
    "a frame of 5 MB",
    "another transfer",
)
"""The others say the same over any link: `test_links` has all of them, in memory."""


@pytest.mark.parametrize("name", OVER_SOCKETS)
async def test_what_is_no_transfer_ends_the_fetch_at_its_first_frame(name, frames):
    lie, error, most = LIES[name]
    got, ended, _ = await fetched(lie(frames))
    assert isinstance(ended, error), ended
    assert "127.0.0.1:" in str(ended) or isinstance(ended, TruncatedError)
    assert got <= min(most, len(frames))


async def test_an_honest_transfer_passes_whole(frames):
    assert await fetched(frames) == (len(frames), None, len(frames))


async def command(answers: Callable[[str, Any], AsyncIterator[bytes]], out: Path) -> tuple[int | None, str]:
    """`kvlink fetch` from an agent that answers so: its status, and what it says of an error."""
    server, port = await serve(answers, SENDER)
    words = ["-m", "kvlink", "fetch", f"kvlink://127.0.0.1:{port}/x", "--question", QUESTION, "-o", str(out)]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=-1, stderr=-1)
    told = (await process.communicate())[1].decode()
    await server.stop(0)
    return process.returncode, told


async def test_the_command_fetches_nothing_from_a_sender_that_speaks_another_protocol(tmp_path):
    asked = []

    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        asked.append(method)
        yield capabilities(protocol_min=2, protocol_max=3).SerializeToString()

    status, told = await command(answers, tmp_path / "context.kvl")
    assert status
    assert "protocol: 1 here, 2 to 3 at the peer" in told
    assert asked == ["GetCapabilities"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["zeros", "a good beginning, then zeros", "no end", "a frame after the end"])
@pytest.mark.parametrize("before", [None, b"an older file"])
async def test_the_command_leaves_no_file_and_an_older_one_as_it_was(name, before, frames, tmp_path):
    out = tmp_path / "context.kvl"
    if before is not None:
        out.write_bytes(before)
    lie = LIES[name][0]

    async def answers(method: str, context: Any) -> AsyncIterator[bytes]:
        if method == "GetCapabilities":
            yield capabilities().SerializeToString()
            return
        for frame in lie(frames):
            yield message(frame)

    status, told = await command(answers, out)
    assert status in (5, 6), told
    assert "Traceback" not in told
    assert (out.read_bytes() if out.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["context.kvl"] if before else [])


def test_a_session_that_only_checks_holds_nothing(frames):
    whole, checking = ReceiveSession(), ReceiveSession(keep=False)
    for frame in frames:
        whole.receive(frame)
        assert [type(event).__name__ for event in checking.receive(frame)] in (
            [],
            ["ManifestReceived"],
            ["SegmentOpened"],
            ["SegmentClosed"],
            ["TransferComplete"],
        )
        assert not checking._buffer
    assert (
        (checking.state, checking.next_sequence)
        == (whole.state, whole.next_sequence)
        == ("done", len(frames))
    )
    assert read_transfer(frames)[1]
