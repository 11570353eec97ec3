"""What is remembered between runs: whole or not at all, whoever writes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlink.model import remembered
from kvlink.model.remembered import cache_dir, recall, remember

KEY = {"files": [["/models/a", 1, 2]], "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def _empty(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))


def _only_file() -> Path:
    (found,) = (path for path in cache_dir().rglob("*") if path.is_file())
    return found


def test_what_is_remembered_comes_back_by_kind_and_key():
    remember("weights", KEY, "aa")
    remember("sketch", KEY, {"numbers": [1, -2.5, None]})
    assert recall("weights", dict(reversed(KEY.items()))) == "aa"
    assert recall("sketch", KEY) == {"numbers": [1, -2.5, None]}
    assert recall("self-test", KEY) is None
    assert recall("weights", {**KEY, "dtype": "float32"}) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"null", b"7", b"\xff\xfe", b'{"value": 1}', b'{"key": 1, "value": 2}', b"[" * 9999],
)
def test_a_damaged_file_counts_as_none_and_is_replaced(content):
    remember("weights", KEY, "aa")
    _only_file().write_bytes(content)
    assert recall("weights", KEY) is None
    remember("weights", KEY, "bb")
    assert recall("weights", KEY) == "bb"


def test_a_value_in_the_place_of_another_is_not_taken_for_it():
    remember("weights", KEY, "aa")
    other = _only_file().read_bytes()
    remember("weights", "another key", "bb")
    for path in cache_dir().rglob("*.json"):
        path.write_bytes(other)
    assert recall("weights", "another key") is None


def test_a_value_that_has_changed_on_the_disk_counts_as_none():
    remember("self-test", KEY, {"kv_heads": 2})
    _only_file().write_bytes(_only_file().read_bytes().replace(b'"kv_heads": 2', b'"kv_heads": 3'))
    assert recall("self-test", KEY) is None


def test_a_directory_that_cannot_be_written_is_only_slower(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(blocked))
    remember("weights", KEY, "aa")
    assert recall("weights", KEY) is None


def test_a_value_that_cannot_be_put_in_place_leaves_nothing_behind():
    remember("weights", KEY, "aa")
    file = _only_file()
    file.unlink()
    file.mkdir()
    (file / "in the way").write_text("")
    remember("weights", KEY, "bb")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_it_is_bounded_in_files_and_bytes(monkeypatch):
    monkeypatch.setattr(remembered, "MAX_FILES", 5)
    monkeypatch.setattr(remembered, "MAX_BYTES", 1000)
    for number in range(12):
        remember("weights", number, "aa")
        os.utime(remembered._file("weights", number), ns=(number, number))
    assert [number for number in range(12) if recall("weights", number)] == [7, 8, 9, 10, 11]
    remember("weights", 11, "a" * 1000)
    assert recall("weights", 11) == "aa"
    remembered._file("weights", 11).write_bytes(b" " * 1001)
    assert recall("weights", 11) is None


def test_only_its_owner_can_look_into_it():
    remember("weights", KEY, "aa")
    assert _only_file().stat().st_mode & 0o077 == 0
    assert _only_file().parent.stat().st_mode & 0o077 == 0


def test_processes_that_write_at_once_lose_nothing():
    code = (
        "import sys; from kvlink.model.remembered import recall, remember\n"
        "for n in range(60):\n"
        "    remember('weights', [sys.argv[1], n], n); remember('weights', 'both', 'the same')\n"
        "    assert recall('weights', 'both') == 'the same'\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(who)]) for who in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert all(recall("weights", [str(who), n]) == n for who in range(4) for n in range(60))
    assert not list(cache_dir().rglob("*.new"))
