"""What an agent calls itself: behind a NAT or in a container it listens on what others cannot dial."""

from __future__ import annotations

import json
import signal

import pytest
import typer

from kvlink.cli import app
from kvlink.cli.configuration import commands_of
from kvlink.errors import ConfigError, RemoteProtocolError
from kvlink.transport.address import check_advertised
from kvlink.transport.convert import capabilities_from_proto
from kvlink.transport.handle import Handle
from kvlink.v1 import sender_pb2
from tests.command import CONTEXT, kvlink, listening, start
from tests.liar import capabilities, lying

OUTSIDE = "agents.example:50051"


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT)
    return str(path)


@pytest.fixture
def publish(monkeypatch, capsys):
    """`kvlink publish` in this process, as if its default were `default`; what it printed."""
    command = dict(commands_of(typer.main.get_command(app)))[("publish",)]
    (sender,) = (p for p in command.params if p.name == "sender_at")

    def run(default: str, *words: str) -> str:
        monkeypatch.setattr(sender, "default", default)
        command.main([*words], prog_name="publish", standalone_mode=False)
        return capsys.readouterr().out.strip()

    return run


def holding(address: str = ""):
    """A sender that says of itself that others reach it at `address`."""
    return {
        "GetCapabilities": lambda *_: capabilities(address=address),
        "PublishContext": lambda *_: sender_pb2.PublishContextResponse(context_id="id", context_tokens=1),
    }


@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_an_agent_says_where_others_reach_it(kind):
    process = start(kind, "--listen", "127.0.0.1:0", "--advertise", "Agents.Example:50051")
    try:
        told = json.loads(kvlink("health", listening(process), "--json").stdout)
        assert told["advertises"] == OUTSIDE
    finally:
        process.send_signal(signal.SIGTERM)
        _, noted = process.communicate()
    assert "--advertise" not in noted


@pytest.mark.parametrize(
    ("kind", "listen", "more", "warned"),
    [
        ("sender", "0.0.0.0:0", [], True),
        ("receiver", "[::]:0", [], True),
        ("sender", "0.0.0.0:0", ["--advertise", OUTSIDE], False),
    ],
)
def test_an_agent_that_listens_everywhere_says_that_it_has_no_name(kind, listen, more, warned):
    process = start(kind, "--listen", listen, "--insecure", *more)
    line = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, noted = process.communicate()
    assert "listens on" in line, noted
    assert (OUTSIDE in line) is not warned
    assert noted.count("--advertise") == int(warned), noted


@pytest.mark.parametrize(
    ("kind", "text"),
    [("sender", "here"), ("receiver", "::1:50051"), ("sender", "0.0.0.0:50051"), ("receiver", "[::]:1")],
)
def test_what_nobody_can_dial_is_refused_before_a_model_is_loaded(kind, text):
    done = kvlink(kind, "--listen", "127.0.0.1:0", "--model", "./nowhere", "--advertise", text)
    assert done.returncode == 2, done.stderr
    assert b"nowhere" not in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:1",
        "[::]:1",
        "[0:0:0:0:0:0:0:0]:1",
        "[::ffff:0.0.0.0]:1",
        "x",
        ":1",
        "x:0",
        "x:99999",
        "::1:5",
        "a\nb:1",
        "unix:1",
    ],
)
def test_no_agent_is_called_by_what_cannot_be_dialled(text):
    with pytest.raises(ConfigError):
        check_advertised(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ""), ("HOST:1", "host:1"), ("[0:0:0:0:0:0:0:1]:5", "[::1]:5"), ("10.0.0.7:1", "10.0.0.7:1")],
)
def test_what_can_be_dialled_has_one_spelling(text, found):
    assert check_advertised(text) == found


def test_a_handle_has_the_senders_own_address_where_nobody_named_one(publish, context):
    with lying(**holding(OUTSIDE)) as at:
        assert publish(at, "--context", context) == str(Handle(OUTSIDE, "id"))


def test_a_handle_has_the_address_that_was_named(publish, context, monkeypatch):
    with lying(**holding(OUTSIDE)) as at:
        assert publish("127.0.0.1:9", "--context", context, "--sender", at) == str(Handle(at, "id"))
        monkeypatch.setenv("KVLINK_SENDER", at)
        assert publish("127.0.0.1:9", "--context", context) == str(Handle(at, "id"))


def test_a_handle_has_the_address_that_was_dialled_where_the_sender_says_none(publish, context):
    with lying(**holding()) as at:
        assert publish(at, "--context", context) == str(Handle(at, "id"))


FALSE = {
    "no address": "here",
    "no port": "host",
    "every address": "0.0.0.0:1",
    "another part of a handle": "host:1/other",
    "a scheme": "kvlink://host:1",
    "a space": "host :1",
    "a line end": "host:1\nkvlink: all is well",
    "an escape": "\x1b[2Jhost:1",
    "another script": "h\u00f6st:1",
    "a megabyte": "x" * 1_000_000 + ":1",
}


@pytest.mark.parametrize("text", FALSE.values(), ids=FALSE)
def test_a_senders_word_about_itself_is_read_as_any_peers(publish, context, text):
    published = []
    methods = holding(text)
    methods["PublishContext"] = lambda *_: published.append(1)
    with (
        lying(**methods) as at,
        pytest.raises(RemoteProtocolError, match=r"(?i)capabilities\.address") as caught,
    ):
        publish(at, "--context", context)
    assert len(str(caught.value)) < 2000
    assert not published, "nothing is read for a sender that cannot say who it is"


def test_capabilities_keep_the_address():
    assert capabilities_from_proto(capabilities(address="HOST:7").capabilities).address == "host:7"
