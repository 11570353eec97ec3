"""Transfers on disk: a disk that is full is told as such, and leaves nothing behind."""

from __future__ import annotations

import pytest

from kvlink.agent import staging as module
from kvlink.agent.staging import Staging
from kvlink.errors import BusyError


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
