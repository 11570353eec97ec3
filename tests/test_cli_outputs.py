"""What commands write: refused before the work, whole or not at all, one line where it fails."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys

import pytest

from tests.command import CONTEXT, QUESTION, kvlink

NOBODY = "127.0.0.1:9"
NO_MODEL = "/no/such/model"


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT)
    return str(path)


def line_of(done, code=2):
    """The one line with which a command ended."""
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert done.stdout == b""
    assert re.fullmatch(r"kvlink: \w+Error: [^\n]+\n", told), told
    return told


COMMANDS = {
    "pack": ["pack", "--context", "CONTEXT", "--model", NO_MODEL, "-o", "OUT"],
    "fetch": ["fetch", f"kvlink://{NOBODY}/00", "-o", "OUT"],
    "profile build": ["profile", "build", NO_MODEL, "-o", "OUT"],
    "ask": ["ask", "--context", "CONTEXT", "--question", QUESTION, "--sender", NOBODY, "--report", "OUT"],
    "demo": ["demo", "--model", NO_MODEL, "--report", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, context, tmp_path):
    """Before a model is looked for, before anybody is dialled: those are not there."""
    for out, reason in (
        (tmp_path / "no" / "x", "there is no folder"),
        (tmp_path, "it is a folder"),
        (context, "it is what is read")
        if "CONTEXT" in COMMANDS[command]
        else ("/no\udcff/x", "there is no folder"),
    ):
        arguments = [{"OUT": str(out), "CONTEXT": context}.get(word, word) for word in COMMANDS[command]]
        assert reason in line_of(kvlink(*arguments))


def test_a_folder_for_results_is_refused_before_the_work(context):
    done = kvlink("eval", "recipes", "--model", NO_MODEL, "--out", f"{context}/results")
    assert "cannot write into" in line_of(done)
    assert "it is no folder" in line_of(kvlink("eval", "recipes", "--model", NO_MODEL, "--out", context))


def test_a_quota_in_the_middle_leaves_the_older_file(context, tmp_path, checkpoint):
    kept = tmp_path / "kept.kvl"
    kept.write_bytes(b"an older good file")
    command = [
        "pack",
        "--context",
        context,
        "--model",
        str(checkpoint("llama")),
        "--recipe",
        "raw",
        "-o",
        str(kept),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "kvlink", *command],
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert "File too large" in line_of(done)
    assert kept.read_bytes() == b"an older good file"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_packed_file_can_go_through_a_pipe(context, tmp_path, checkpoint):
    """Nothing else is on standard output then, whatever was asked for."""
    model = str(checkpoint("llama"))
    packed = kvlink("pack", "--context", context, "--model", model, "--json", "-o", "/dev/stdout")
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "x.kvl").write_bytes(packed.stdout)
    told = kvlink("inspect", str(tmp_path / "x.kvl"))
    assert told.returncode == 0, told.stderr
    full = kvlink("pack", "--context", context, "--model", model, "-o", "/dev/full")
    assert "No space left on device" in line_of(full)


@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [
        (1, ["--version"], 0),
        (1, ["certs", "init", "net"], 0),
        (2, ["health", "127.0.0.1:1"], 4),
        (0, ["publish", "--context", "-"], 2),
    ],
)
def test_a_closed_standard_stream_is_one_that_nobody_reads(tmp_path, closed, words, code):
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {closed}>&-', sys.executable, "-m", "kvlink", *words],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == (1 if closed == 0 else 0)


def test_what_closed_streams_leave_free_is_taken_by_no_file(tmp_path):
    """A file with the number of standard output would take every line that is printed."""
    script = (
        "import os, sys; from kvlink.terminal import *; open_standard_streams()\n"
        "file = os.open('x', os.O_CREAT | os.O_WRONLY); assert file > 2, file\n"
        "print('said'); print('noted', file=sys.stderr); assert sys.stdin.read() == ''"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=False, preexec_fn=lambda: os.closerange(0, 3)
    )
    assert done.returncode == 0
    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize(
    "words", [["--help"], ["sender", "--help"], ["certs", "init", "--help"], ["--version"]]
)
def test_help_that_cannot_be_written_is_one_line(words):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvlink", *words], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert b"No space left" in done.stderr
    assert done.stderr.count(b"\n") == 1
