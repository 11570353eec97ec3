"""Transfers on disk: a disk that is full is told as such, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvlink.agent import staging as module
from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.settings import ReceiverSettings
from kvlink.agent.shares import Account
from kvlink.agent.staging import Staging
from kvlink.errors import BusyError, LimitError, NotFoundError
from kvlink.transport.api import Ask, Caller
from tests.agent.conftest import QUESTION, TEXT


@pytest.mark.parametrize("step", ["note", "file"])
def test_a_transfer_that_cannot_begin_on_disk_is_told_to_come_again(tmp_path, monkeypatch, step):
    staging = Staging(tmp_path, 1_000_000)

    def full(*_):
        raise OSError(28, "No space left on device")

    if step == "note":
        monkeypatch.setattr(staging, "note", full)
    else:
        monkeypatch.setattr(module, "write_frames", full)
    with pytest.raises(BusyError, match="cannot be kept on disk: No space left on device"):
        staging.begin(b"k" * 16, {"owner": ""})
    assert list(tmp_path.iterdir()) == []
    assert not list(staging)


ANNA, BERT, MALLORY = Account("anna"), Account("bert"), Account("mallory")


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"-")


def on_disk(staging: Staging) -> set[str]:
    """What is there, and all of it: files and what is counted agree."""
    found = {found.rstrip(b"-").decode() for found in staging}
    assert {path.stem for path in staging.folder.glob("*.kvl")} == {key(name).hex() for name in found}
    size = sum(path.stat().st_size for path in staging.folder.glob("*.kvl"))
    assert size <= staging._shares.max_bytes
    assert size == sum(file.nbytes for file in staging._files.values())
    return found


def keep(staging: Staging, name: str, account: Account, nbytes: int) -> None:
    """A whole transfer whose file has `nbytes`."""
    staging.keep(key(name), [b"x" * (nbytes - 16)], {}, account)


def test_a_greedy_peer_pushes_out_its_own_only(tmp_path):
    staging = Staging(tmp_path, 1000)
    keep(staging, "anna", ANNA, 400)
    for number in range(20):
        keep(staging, f"m{number}", MALLORY, 100)
    assert on_disk(staging) == {"anna", *(f"m{number}" for number in range(15, 20))}


def test_a_newcomer_within_its_share_gets_room_from_who_is_beyond(tmp_path):
    staging = Staging(tmp_path, 1000, 1000)
    for number in range(10):
        keep(staging, f"m{number}", MALLORY, 100)
    keep(staging, "anna", ANNA, 300)
    assert on_disk(staging) == {"anna", *(f"m{number}" for number in range(3, 10))}


def test_what_is_at_work_stays_and_leaves_room_for_others(tmp_path):
    staging = Staging(tmp_path, 1000)
    begun = staging.begin(key("m0"), {}, MALLORY)
    begun.add(b"x" * 400)
    with pytest.raises(
        BusyError, match="transfer on disk: at most 1000 are held here, 500 for one peer"
    ) as caught:
        keep(staging, "m1", MALLORY, 200)
    assert caught.value.retry_after_s
    assert on_disk(staging) == {"m0"}, "what found no room leaves nothing behind"
    keep(staging, "anna", ANNA, 300)
    begun.add(b"x" * 10)
    assert on_disk(staging) == {"m0", "anna"}


def test_a_file_that_could_never_be_kept_is_refused_for_good(tmp_path):
    staging = Staging(tmp_path, 1000)
    begun = staging.begin(key("m0"), {}, MALLORY)
    begun.add(b"x" * 400)
    with pytest.raises(LimitError, match="at most 500 are held for one peer"):
        begun.add(b"x" * 100)


def test_shares_outlive_a_restart(tmp_path):
    first = Staging(tmp_path, 1000)
    keep(first, "anna", ANNA, 300)
    for number in range(4):
        keep(first, f"m{number}", MALLORY, 100)
    second = Staging(tmp_path, 1000)
    for number in range(4, 20):
        keep(second, f"m{number}", MALLORY, 100)
    assert "anna" in on_disk(second)
    keep(second, "bert", BERT, 300)
    assert on_disk(second) >= {"anna", "bert"}


def test_what_is_read_again_stays_until_it_is_at_rest(tmp_path):
    staging = Staging(tmp_path, 1000)
    keep(staging, "a", ANNA, 400)
    file, _ = staging.resume(key("a"))
    with pytest.raises(BusyError):
        keep(staging, "b", ANNA, 200)
    file.close()
    staging.rest(key("a"))
    keep(staging, "b", ANNA, 200)
    assert on_disk(staging) == {"b"}


def test_a_disk_that_refuses_takes_no_room(tmp_path, monkeypatch):
    staging = Staging(tmp_path, 1000)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fdatasync", full)
    with pytest.raises(BusyError, match="No space left on device"):
        keep(staging, "a", ANNA, 400)
    monkeypatch.undo()
    assert on_disk(staging) == set()
    keep(staging, "a", ANNA, 500)


@pytest.mark.parametrize("noted", ['{"account": 7}', '{"account": ["a"]}', '{"at": "x"}', "[", "7"])
def test_notes_that_say_nothing_break_no_start(tmp_path, noted):
    keep(Staging(tmp_path, 1000), "a", ANNA, 400)
    (tmp_path / f"{key('a').hex()}.json").write_text(noted)
    assert on_disk(Staging(tmp_path, 1000)) == {"a"}


async def test_a_peers_cache_on_disk_outlives_a_restart_beside_a_greedy_one(random_lm, tmp_path):
    """And the one that made room is as if it had never been there: no error, no litter."""
    sender = Sender(random_lm("qwen2", "bfloat16"))
    context = sender.read(TEXT)

    def frames(name: str) -> tuple[bytes, ...]:
        return sender.pack(context, QUESTION, "int8", transfer_id=key(name)).frames

    async def push(name: str, who: str) -> str:
        async def stream() -> AsyncIterator[bytes]:
            for frame in frames(name):
                yield frame

        found = [status async for status in service.push_cache(stream(), Caller(who))]
        assert found[-1].state == "complete"
        return found[-1].cache_id

    size = 12 + sum(4 + len(frame) for frame in frames("size"))
    settings = ReceiverSettings(staging=tmp_path, max_staged_bytes=4 * size + 400)
    service = ReceiverService(Receiver(sender.lm), settings)
    annas = await push("anna", "anna")
    others = [await push(f"m{number}", "mallory") for number in range(5)]
    assert len(list(tmp_path.glob("*.kvl"))) == 3, "two of mallory's, and anna's"

    service = ReceiverService(Receiver(sender.lm), settings)

    async def answered(cache_id: str, who: str) -> str:
        return "".join([p.text async for p in service.generate(Ask(cache_id, QUESTION), Caller(who))])

    assert await answered(annas, "anna") == await answered(others[-1], "mallory")
    with pytest.raises(NotFoundError):
        await answered(others[0], "mallory")
    assert await push("m0", "mallory"), "what made room comes again under its own id"
    service.delete_cache(annas, Caller("anna"))
    assert not list(tmp_path.glob(f"{key('anna').hex()}.*"))


def test_what_is_given_up_while_it_is_read_is_not_there(tmp_path, monkeypatch):
    staging = Staging(tmp_path, 1000)
    keep(staging, "a", ANNA, 400)
    read = module.read_frames

    def read_and_lose(source):
        yield from read(source)
        staging.forget(key("a"))

    monkeypatch.setattr(module, "read_frames", read_and_lose)
    assert staging.resume(key("a")) is None
    assert on_disk(staging) == set()
    assert list(tmp_path.iterdir()) == []
