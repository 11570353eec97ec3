"""A template's name with escape sequences and line ends, in a file and in a refused transfer.

`kvlink inspect` of a stranger's file took the terminal over, or showed sizes that were made up; the refusal wrote a
line into the receiver's log that looked like its own, or megabytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.file import write_frames
from tests.cases.peer import QUESTION, ended
from tests.command import kvlink
from tests.forging import forged
from tests.hostile import obeyed

ESCAPES = "\x1b]0;OWNED\x07\x1b[2J\x1b[31mHACKED\x1b[0m"
SIZES = "kept_tokens        999"
LOGGED = "2026-01-01 00:00:00,000 INFO kvlink.receiver transfer complete: 1 bytes FORGED"
MOST = 20_000
"""Characters of a refusal, and of what the log has of it."""


def named(template_id: str) -> Callable[[pb.Manifest], object]:
    return lambda manifest: setattr(manifest.prompt, "template_id", template_id)


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--bytes"], ["unpack", "--question", QUESTION]])
def test_a_file_writes_nothing_of_its_own_on_the_terminal(honest, tmp_path, command):
    path = tmp_path / "context.kvl"
    with path.open("wb") as out:
        write_frames(forged(honest(), named(f"x{ESCAPES}\n{SIZES}")), out)
    done = kvlink(command[0], str(path), *command[1:])
    told = (done.stdout + done.stderr).decode()
    assert told
    assert obeyed(told) == ""
    assert f"\n{SIZES}" not in told


@pytest.mark.parametrize("name", [f"x{ESCAPES}\n{LOGGED}", "x" * 3_900_000], ids=["line ends", "3.9 MB"])
def test_a_refused_transfer_writes_nothing_of_its_own_into_the_log(network, source, honest, name):
    before = network.receiver.said()
    status, why = ended(lambda: source.push(forged(honest(), named(name))))
    assert status not in ("OK", "INTERNAL", "UNKNOWN"), why
    assert len(why) < MOST
    assert "\x1b" not in why
    source.push(forged(honest()))  # what there was to log has been logged
    logged = network.receiver.said()[len(before) :]
    assert logged
    assert len(logged) < MOST
    assert obeyed(logged) == ""
    assert not [line for line in logged.splitlines() if line.startswith(LOGGED)]
