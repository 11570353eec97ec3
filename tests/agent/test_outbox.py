"""Packed transfers: a peer keeps what it has in memory, however much another asks for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvlink.agent.outbox import Outbox
from kvlink.agent.requests import request_digest
from kvlink.agent.sender import Sender
from kvlink.agent.staging import Staging
from kvlink.agent.transfer import Transfer
from kvlink.errors import BusyError, CodecError, LimitError, NotFoundError, RemoteProtocolError
from kvlink.payload import Group
from kvlink.receipt import Receipt
from kvlink.recipe import Target
from kvlink.transport.api import Caller, Delivery, Fetch
from tests.agent.conftest import QUESTION, TEXT

ANNA, BERT, MALLORY = Caller("anna"), Caller("bert"), Caller("mallory")


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"-")


class Box:
    """An outbox and how often each transfer was packed."""

    def __init__(self, max_bytes: int = 100, **options: Any) -> None:
        self.outbox = Outbox(60.0, max_bytes, **options)
        self.packed: list[str] = []

    async def get(self, name: str, caller: Caller, nbytes: int, *, keep: bool = False) -> Any:
        """Have a transfer of that size packed; `keep`: it stays in use."""

        @asynccontextmanager
        async def pack() -> AsyncIterator[Transfer]:
            self.packed.append(name)
            yield Transfer.of_frames(None, [b"x" * nbytes], Receipt())  # type: ignore[arg-type]

        found = await self.outbox.get(key(name), caller, name, pack)
        try:
            await found.packed()
        finally:
            if not keep:
                self.outbox.leave(found)
        return found

    def __contains__(self, name: str) -> bool:
        return any(held == key(name) for held in self.outbox._held)


async def test_a_greedy_peer_pushes_out_its_own_only():
    box = Box()
    await box.get("anna", ANNA, 40)
    for number in range(20):
        await box.get(f"m{number}", MALLORY, 10)
    assert "anna" in box
    assert box.outbox.held_bytes <= 40 + 50
    await box.get("anna", ANNA, 40)
    assert box.packed.count("anna") == 1, "asked for again it is not packed again"


async def test_a_newcomer_within_its_share_gets_room_from_who_is_beyond():
    box = Box(max_peer_bytes=100)
    for number in range(10):
        await box.get(f"m{number}", MALLORY, 10)
    await box.get("anna", ANNA, 40)
    assert "anna" in box
    assert "m9" in box
    assert box.outbox.held_bytes <= 100


async def test_what_is_on_its_way_of_one_peer_leaves_room_for_another():
    box = Box()
    for number in range(5):
        await box.get(f"m{number}", MALLORY, 10, keep=True)
    with pytest.raises(
        BusyError, match="packed transfer: at most 100 are held here, 50 for one peer"
    ) as caught:
        await box.get("m5", MALLORY, 10)
    assert caught.value.retry_after_s
    assert "m5" not in box
    await box.get("anna", ANNA, 30)
    await box.get("bert", BERT, 20)


async def test_without_names_the_host_has_the_share():
    box = Box()
    await box.get("near", Caller(host="10.0.0.1"), 40)
    for number in range(20):
        await box.get(f"m{number}", Caller(host="10.0.0.2"), 10)
    assert "near" in box


async def test_what_could_never_be_held_is_refused_for_good():
    box = Box()
    with pytest.raises(LimitError, match="at most 50 are held for one peer"):
        await box.get("large", ANNA, 51)
    assert len(box.outbox) == 0


async def test_what_comes_from_disk_has_its_place_in_the_share_too(random_lm, tmp_path: Path):
    sender = Sender(random_lm("qwen2", "bfloat16"))
    context = sender.read(TEXT)
    sizes = []

    async def ask(outbox: Outbox, name: str, *, fail: bool = False) -> Any:
        @asynccontextmanager
        async def pack() -> AsyncIterator[Transfer]:
            assert not fail, "it is on disk"
            found = sender.pack(context, QUESTION, "int8", transfer_id=key(name))
            sizes.append(sum(map(len, found.frames)))
            yield found

        held = await outbox.get(key(name), ANNA, name, pack)
        await held.packed()
        return held

    first = Outbox(60.0, 10**9, Staging(tmp_path, 10**9))
    for name in ("a", "b"):
        first.leave(await ask(first, name))
    room = 2 * max(sizes) + 10
    second = Outbox(60.0, room, Staging(tmp_path, 10**9))
    await ask(second, "a", fail=True)
    with pytest.raises(BusyError, match="for one peer"):
        await ask(second, "b", fail=True)
    assert second.held_bytes <= room // 2 + 1


class Slowly:
    """A transfer of the random model whose groups are made one at a time, when the test says so."""

    def __init__(self, sender: Sender, recipe: str = "int8", fail_at: int = -1) -> None:
        self.transfer = sender.pack(sender.read(TEXT), QUESTION, recipe, transfer_id=key("slow"))
        self.go_on = threading.Semaphore(0)
        self.made = self.left = 0
        pack = self.transfer._pack

        def gated(groups: Iterator[Group]) -> Iterator[Group]:
            for group in groups:
                self.go_on.acquire()
                if self.made == fail_at:
                    raise CodecError("a number is not finite")
                self.made += 1
                yield group

        outlines = [(header, gated(groups)) for header, groups in sender_outlines(self.transfer)]
        self.transfer._source = pack(outlines)

    @asynccontextmanager
    async def pack(self) -> AsyncIterator[Transfer]:
        try:
            yield self.transfer
        finally:
            self.left += 1


def sender_outlines(transfer: Transfer) -> Any:
    """The outlines that a transfer was made of: those that its generator has not begun yet."""
    return transfer._source.gi_frame.f_locals["outlines"]  # type: ignore[union-attr]


@pytest.fixture
def slow_sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"))


async def test_frames_can_be_sent_while_later_layers_are_still_to_be_coded(slow_sender):
    outbox, slowly = Outbox(60.0, 10**9), Slowly(slow_sender)
    held = await outbox.get(key("slow"), ANNA, "r", slowly.pack)
    assert await held.frame(0), "the manifest"
    assert await held.frame(1), "the header of the segment"
    assert (slowly.made, held.count) == (0, None)
    slowly.go_on.release()
    assert await held.frame(2), "the first layer"
    assert (slowly.made, held.count) == (1, None)
    third = asyncio.create_task(held.frame(3))
    await asyncio.sleep(0)
    assert not third.done()
    slowly.go_on.release(100)
    assert await third
    receipt = await held.packed()
    assert held.count == len(held.transfer.frames)
    assert held.nbytes == sum(map(len, held.transfer.frames))
    assert receipt.bytes["codes"] > 0
    assert slowly.left == 1
    assert await held.frame(held.count) is None


async def test_packing_goes_on_when_whoever_asked_is_gone_and_another_call_gets_the_rest(slow_sender):
    outbox, slowly = Outbox(0.0, 10**9), Slowly(slow_sender)
    held = await outbox.get(key("slow"), ANNA, "r", slowly.pack)
    outbox.leave(held)
    outbox.sweep()
    slowly.go_on.release(100)
    again = await outbox.get(key("slow"), ANNA, "r", slowly.pack)
    assert again is held
    await again.packed()
    assert slowly.left == 1, "packed once"


async def test_what_is_given_up_stops_at_its_next_frame_and_its_readers_hear_of_it(slow_sender):
    outbox, slowly = Outbox(60.0, 10**9), Slowly(slow_sender)
    held = await outbox.get(key("slow"), ANNA, "r", slowly.pack)
    waiting = asyncio.create_task(held.frame(3))
    await asyncio.sleep(0)
    outbox.forget(key("slow"))
    for _ in range(5):  # the packing hears of it before its thread goes on
        await asyncio.sleep(0)
    slowly.go_on.release()
    with pytest.raises(NotFoundError, match="given up while it was packed"):
        await waiting
    assert slowly.left == 1
    assert slowly.made <= 1
    assert len(outbox) == 0


async def test_what_ends_the_packing_reaches_every_reader(slow_sender):
    outbox, slowly = Outbox(60.0, 10**9), Slowly(slow_sender, fail_at=1)
    held = await outbox.get(key("slow"), ANNA, "r", slowly.pack)
    readers = [asyncio.create_task(held.frame(3)) for _ in range(2)]
    slowly.go_on.release(2)
    for reader in readers:
        with pytest.raises(CodecError, match="not finite"):
            await reader
    with pytest.raises(CodecError, match="not finite"):
        await held.packed()
    assert len(outbox) == 0
    with pytest.raises(CodecError, match="not finite"):
        _ = slowly.transfer.frames


async def test_a_life_that_ended_while_packing_is_followed_by_the_same_frames_or_by_none(
    slow_sender, tmp_path
):
    staging = Staging(tmp_path, 10**9)
    whole = slow_sender.pack(slow_sender.read(TEXT), QUESTION, "int8", transfer_id=key("slow"))
    staged = staging.begin(key("slow"), {"owner": "anna", "request": "r"})
    staged.add(*whole.frames[:3])
    staged.close()

    @asynccontextmanager
    async def pack(recipe: str) -> AsyncIterator[Transfer]:
        yield slow_sender.pack(slow_sender.read(TEXT), QUESTION, recipe, transfer_id=key("slow"))

    second = Outbox(60.0, 10**9, Staging(tmp_path, 10**9))
    held = await second.get(key("slow"), ANNA, "r", lambda: pack("int8"))
    await held.packed()
    assert held.transfer.frames == whole.frames
    staged = staging.begin(key("slow"), {"owner": "anna", "request": "r"})
    staged.add(*whole.frames[:3])
    staged.close()
    third = Outbox(60.0, 10**9, Staging(tmp_path, 10**9))
    held = await third.get(key("slow"), ANNA, "r", lambda: pack("int4"))
    with pytest.raises(RemoteProtocolError, match="a new attempt needs an id of its own"):
        await held.packed()


def test_a_request_is_told_by_what_it_asks_for():
    delivery = Delivery("127.0.0.1:1", "Who?", text="A text.", target=Target(max_bits=2.0))
    assert request_digest(delivery) == request_digest(
        Delivery("127.0.0.1:1", "Who?", text="A text.", target=Target(0, 2.0))
    )
    others = [
        Delivery("127.0.0.1:1", "Who?", text="A text."),
        Delivery("127.0.0.1:1", "Who?", context_id="A text.", target=Target(max_bits=2.0)),
        Delivery("127.0.0.1:1", "Who?", text="A text.", target=Target(max_bits=3.0)),
        Delivery("127.0.0.1:2", "Who?", text="A text.", target=Target(max_bits=2.0)),
        Fetch("A text.", "Who?", target=Target(max_bits=2.0)),
    ]
    assert len({request_digest(one) for one in (delivery, *others)}) == 6
