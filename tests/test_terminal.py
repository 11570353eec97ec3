"""What a command says: one door, and nothing hostile comes through it."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink import show, terminal
from kvlink.quoting import LINE
from kvlink.receipt import Certificate, Receipt
from tests.hostile import HOSTILE, obeyed
from tests.test_architecture import PACKAGE, modules

ANY = st.text(st.characters(codec=None), max_size=300)


@pytest.fixture(scope="module")
def said():
    """What a call prints, for properties too: capsys lives for one test only."""

    def of(call, *arguments):
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            call(*arguments)
        out.flush()
        return out.buffer.getvalue().decode()

    return of


@given(ANY)
def test_whatever_is_said_is_one_line_of_what_can_be_seen(said, text):
    for call in (terminal.say, terminal.note):
        told = said(call, text)
        assert told.endswith("\n")
        assert told[:-1].splitlines() in ([told[:-1]], [])
        assert obeyed(told) == ""


@given(ANY)
def test_text_keeps_its_lines_and_nothing_a_terminal_obeys(said, text):
    assert obeyed(said(terminal.say_text, text)) == ""


def none_of_json(word):
    raise AssertionError(f"{word} is no JSON")


LEAVES = ANY | st.floats() | st.integers() | st.none()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(ANY, inner)))
def test_data_is_valid_json(said, value):
    told = said(terminal.say_json, value)
    assert obeyed(told) == ""
    json.loads(told, parse_constant=none_of_json)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_table_of_hostile_cells_has_its_rows_and_no_more(said, text):
    told = said(
        terminal.say_table, text, [("name", "left"), ("figure", "right")], [(text, "1"), ("honest", text)]
    )
    assert obeyed(told) == ""
    assert text != HOSTILE["markup"] or "[link=http://example.org]" in told, "markup is text"
    assert len(told) < 20 * LINE


RECEIPT = Receipt(
    transfer_id="x", recipe="int8", context_tokens=10, kept_tokens=5, element_count=100,
    stage_s={"prefill": 0.1, "decode": 0.1}, bytes={"codes": 50},
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_receipt_of_a_hostile_peer(said, text):
    lying = Receipt(
        transfer_id=text, recipe=text, context_tokens=10, kept_tokens=5, element_count=100,
        stage_s={"prefill": 0.1, text: 1.0}, bytes={"codes": 50, text: 10},
        certificate=Certificate(1, 1, 0.0, 0.0, 1, 0.1),
    )  # fmt: skip
    told = said(show.say_receipt, lying)
    assert obeyed(told) == ""
    assert told.count("\n") == said(show.say_receipt, RECEIPT).count("\n") + 1, (
        "the certificate's line, no other"
    )
    assert "\nkvlink: all is well" not in told


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e308, 0.0, 2.0**70])
def test_a_receipt_of_numbers_that_are_none(said, number):
    lying = Receipt(
        stage_s={"prefill": number, "decode": number}, bytes={"codes": 2**64 - 1}, kept_tokens=2**63, element_count=1,
        certificate=Certificate(0, 0, number, number, 2**32 - 1, number),
    )  # fmt: skip
    assert obeyed(said(show.say_receipt, lying)) == ""
    json.loads(said(terminal.say_json, show.receipt_dict(lying)), parse_constant=none_of_json)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_printed_but_through_the_door(path):
    """A `print` elsewhere would be a way round it. The overhead's child answers its parent on a pipe."""
    if path.name in ("terminal.py", "overhead.py"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {getattr(node, "id", ""), getattr(node, "attr", "")}
        assert not names & {"print", "echo", "secho", "Console"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"):
            assert getattr(node.value, "id", "") != "sys", f"line {node.lineno}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_of_a_terminal_can_take_it(encoding):
    code = (
        "from kvlink.terminal import say, say_text, say_json, say_table, note\n"
        "say('naïve 世界'); say_text('naïve 世界'); note('naïve 世界'); say_json({'a': 'naïve 世界'})\n"
        "say_table('naïve 世界', [('世', 'left')], [['naïve 世界']])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout.decode(encoding)
    data = told[told.index("{") : told.index("}") + 1]
    assert json.loads(data) == {"a": "naïve 世界"}


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    code = "from kvlink.terminal import say\nfor n in range(100_000): say(n)"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    assert command.stdout.readline() == b"0\n"
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait() == 0


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvlink", "--version"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert done.stderr == b"kvlink: ConfigError: cannot write to standard output: No space left on device\n"
