"""Files that add to files, and handles that a receiver redeems, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import CONTEXT, QUESTION, kvlink, listening, start

OTHER = "Who believed the part about the whale?"
RECIPE = "q2c@0.3 int8"


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """A sender's and a receiver's, both with the embedded model."""
    processes = [start(kind, "--listen", "127.0.0.1:0") for kind in ("sender", "receiver")]
    try:
        yield [listening(process) for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=60)


def told(*arguments: str, stdin: bytes = b"") -> dict:
    done = kvlink(*arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def publish(addresses: list[str], text: str, *more: str) -> str:
    return told("publish", "--context", "-", "--sender", addresses[0], *more, stdin=text.encode())["handle"]


def fetch(handle: str, question: str, out: Path, *more: str) -> int:
    return told("fetch", handle, "--question", question, "--recipe", RECIPE, "-o", str(out), *more)[
        "file_bytes"
    ]


def test_a_file_adds_to_another_and_a_third_to_both(addresses, tmp_path):
    one, two, three = (tmp_path / f"{name}.kvl" for name in ("one", "two", "three"))
    handle = publish(addresses, CONTEXT)
    whole = fetch(handle, QUESTION, one)
    assert fetch(handle, OTHER, two, "--base", str(one)) < whole
    alone = kvlink("unpack", str(two), "--question", OTHER)
    assert alone.returncode == 6, "what it adds to is not here"
    assert b"is not here" in alone.stderr
    answer = told("unpack", str(two), "--base", str(one), "--question", OTHER)
    assert answer["kept_share"] > 0.3
    longer = publish(addresses, "The ice came in April.", "--extends", handle)
    fetch(longer, OTHER, three, "--base", str(two))
    files = ["--base", str(one), "--base", str(two)]
    third = told("unpack", str(three), *files, "--question", OTHER)
    assert third["context_tokens"] > answer["context_tokens"]
    wrong = kvlink("unpack", str(three), "--base", str(one), "--question", OTHER)
    assert wrong.returncode == 6


def test_a_receiver_redeems_a_handle_and_keeps_what_came(addresses):
    handle = publish(addresses, CONTEXT)
    ask = ("ask", "--handle", handle, "--pull", "--recipe", RECIPE, "--receiver", addresses[1])
    first = told(*ask, "--question", QUESTION)
    second = told(*ask, "--question", OTHER)
    again = told(*ask, "--question", QUESTION)
    assert first["cache_id"] != second["cache_id"] == again["cache_id"]
    assert again["answer"] == first["answer"]


def test_pull_goes_with_a_handle(addresses):
    done = kvlink("ask", "--context", "-", "--pull", "--question", QUESTION, stdin=CONTEXT.encode())
    assert done.returncode == 2
    assert b"--pull goes with --handle" in done.stderr
