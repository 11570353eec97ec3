"""Packed transfers: a peer keeps what it has in memory, however much another asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlink.agent.outbox import Outbox
from kvlink.agent.sender import Sender
from kvlink.agent.staging import Staging
from kvlink.errors import BusyError, LimitError
from kvlink.transport.api import Caller
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

        async def pack() -> Any:
            self.packed.append(name)
            return SimpleNamespace(frames=(b"x" * nbytes,))

        found = await self.outbox.get(key(name), caller, name, pack)
        if not keep:
            self.outbox.leave(found)
        return found

    def __contains__(self, name: str) -> bool:
        return any(held == key(name) for held in self.outbox._packed)


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
    with pytest.raises(BusyError, match="at most 100 are packed at a time, 50 for one peer") as caught:
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
        async def pack() -> Any:
            assert not fail, "it is on disk"
            found = sender.pack(context, QUESTION, "int8", transfer_id=key(name))
            sizes.append(sum(map(len, found.frames)))
            return found

        return await outbox.get(key(name), ANNA, name, pack)

    first = Outbox(60.0, 10**9, Staging(tmp_path, 10**9))
    for name in ("a", "b"):
        first.leave(await ask(first, name))
    room = 2 * max(sizes) + 10
    second = Outbox(60.0, room, Staging(tmp_path, 10**9))
    await ask(second, "a", fail=True)
    with pytest.raises(BusyError, match="for one peer"):
        await ask(second, "b", fail=True)
    assert second.held_bytes <= room // 2 + 1
