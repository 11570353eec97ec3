"""The command line as its users meet it: real processes, real files, exit codes that mean something."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import CONTEXT, QUESTION, kvlink, listening, start


@dataclass
class Agents:
    model: str
    sender: str
    receiver: str

    def at(self) -> list[str]:
        return ["--sender", self.sender, "--receiver", self.receiver]


@pytest.fixture(scope="module")
def agents(checkpoint, tmp_path_factory) -> Iterator[Agents]:
    """A sender and a receiver; the receiver is configured by a file, the sender by its environment."""
    model = str(checkpoint("qwen2", "bfloat16"))
    config = tmp_path_factory.mktemp("config") / "kvlink.toml"
    config.write_text(f'[receiver]\nlisten = "127.0.0.1:0"\nmodel = "{model}"\nmax-transfers = 4\n')
    receiver = subprocess.Popen(
        [sys.executable, "-m", "kvlink", "--config", str(config), "receiver"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sender = start("sender", KVLINK_SENDER_LISTEN="127.0.0.1:0", KVLINK_SENDER_MODEL=model)
    try:
        yield Agents(model, listening(sender), listening(receiver))
    finally:
        for process in (sender, receiver):
            process.terminate()
            process.wait(20)


@pytest.fixture
def context(tmp_path: Path) -> str:
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT)
    return str(path)


def test_ask_prints_the_answer_the_senders_own_and_the_receipt(agents, context):
    done = kvlink("ask", "--context", context, "--question", QUESTION, "--recipe", "raw", *agents.at())
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    for word in (
        "the sender itself",
        "receipt",
        "prefill",
        "codes",
        "socket's own count",
        "bits per element",
    ):
        assert word in text


def test_ask_as_data(agents, context):
    done = kvlink(
        "ask", "--context", context, "--question", QUESTION, "--recipe", "raw", "--json", *agents.at()
    )
    told = json.loads(done.stdout)
    assert told["answer"] == told["sender_answer"]
    assert told["agrees"] is True
    assert (told["mode"], told["recipe"]) == ("kv", "raw")
    assert 0 < told["ttft_s"] < 60
    assert told["wire_bytes"] == sum(told["bytes"].values())
    assert set(told["stage_s"]) == {
        "prefill", "draft", "select", "encode", "wire", "decode", "first_token", "generate",
    }  # fmt: skip
    assert told["bits_per_element"] == pytest.approx(16, abs=0.5)
    assert "all keys=raw values=raw" in told["recipe_full"]


def test_ask_reads_the_context_from_standard_input_and_keeps_a_budget(agents):
    done = kvlink(
        "ask", "--context", "-", "--question", QUESTION, "--recipe", "q2c@1.0 int4", "--budget", "15kB", "--json",
        *agents.at(), stdin=CONTEXT.encode(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wire_bytes"] <= 15_000


def test_publish_ask_fetch_unpack_unpublish(agents, context, tmp_path):
    published = kvlink("publish", "--context", context, "--sender", agents.sender, "--json")
    handle = json.loads(published.stdout)["handle"]
    asked = kvlink(
        "ask", "--handle", handle, "--question", QUESTION, "--recipe", "raw", "--json", *agents.at()
    )
    answer = json.loads(asked.stdout)["answer"]
    out = str(tmp_path / "pulled.kvl")
    fetched = kvlink("fetch", handle, "--question", QUESTION, "--recipe", "raw", "-o", out)
    assert fetched.returncode == 0, fetched.stderr
    unpacked = kvlink("unpack", out, "--question", QUESTION, "--model", agents.model, "--json")
    assert json.loads(unpacked.stdout)["answer"] == answer
    assert kvlink("unpublish", handle).returncode == 0
    again = kvlink("ask", "--handle", handle, "--question", QUESTION, *agents.at())
    assert again.returncode == 6
    assert b"NotFoundError" in again.stderr


def test_health_says_who_is_there(agents):
    for address, kind in ((agents.sender, "sender"), (agents.receiver, "receiver")):
        told = json.loads(kvlink("health", address, "--json").stdout)
        assert (told["agent"], told["status"]) == (kind, "SERVING")


def test_pack_inspect_unpack_without_agents(checkpoint, context, tmp_path):
    model, out = str(checkpoint("qwen2", "bfloat16")), str(tmp_path / "kept.kvl")
    packed = kvlink(
        "pack", "--context", context, "--question", QUESTION, "--recipe", "q2c@0.5 int4", "-o", out,
        "--model", model, "--json",
    )  # fmt: skip
    told = json.loads(packed.stdout)
    assert told["file_bytes"] == Path(out).stat().st_size
    seen = json.loads(kvlink("inspect", out, "--json").stdout)
    assert seen["kept_tokens"] == told["kept_tokens"]
    assert seen["recipe_full"] == told["recipe_full"]
    assert seen["bytes"]["codes"] == told["bytes"]["codes"]
    assert kvlink("inspect", out).stdout.startswith(b"mode")
    assert kvlink("unpack", out, "--question", QUESTION, "--model", model).returncode == 0


def test_a_file_that_was_cut_is_answered_from_where_that_is_asked_for(checkpoint, context, tmp_path):
    """Packed within a deadline it is in tiers; without one a cut leaves nothing."""
    model, out = str(checkpoint("qwen2", "bfloat16")), tmp_path / "cut.kvl"
    asked = ["--question", QUESTION, "--model", model, "--json"]
    packed = kvlink(
        "pack", "--context", context, "--recipe", "raw", "--deadline", "60", "-o", str(out), *asked
    )
    assert json.loads(packed.stdout)["segments"] > 2
    out.write_bytes(out.read_bytes()[: out.stat().st_size * 6 // 10])
    refused = kvlink("unpack", str(out), *asked)
    assert (refused.returncode, b"TruncatedError" in refused.stderr) == (5, True)
    told = json.loads(kvlink("unpack", str(out), "--partial", *asked).stdout)
    assert 0.1 < told["kept_share"] < 0.6
    assert told["answer"]


def test_demo_runs_two_processes_and_reports_every_row(checkpoint):
    done = kvlink("demo", "--model", str(checkpoint("qwen2", "bfloat16")), "--n", "2", "--json")
    report = json.loads(done.stdout)
    # A random model's answers hang on the last bits, so INT8 may fail it; then the exit code says so.
    assert all(failure.startswith("int8 ") for failure in report["failures"])
    assert done.returncode == (1 if report["failures"] else 0), done.stderr
    assert [row["recipe"] for row in report["rows"]] == [
        "text", "raw", "int8", "int4", "q2c@0.5 int4", "q2c+draft@0.25 int4", "transform=1",
        "q2c+draft@0.25 transform=0.5 rest=2",
    ]  # fmt: skip
    for row in report["rows"]:
        fields = {"mode", "recipe", "recipe_full", "n", "f1", "f1_full", "agreement", "wire_bytes"}
        assert fields | {"bits_per_element", "ttft_s"} <= set(row)
        assert row["n"] == 7
    raw = report["rows"][1]
    assert raw["agreement"] == 1.0
    assert raw["bits_per_element"] == pytest.approx(16, abs=0.3)


def test_demo_on_a_squad_file(checkpoint, tmp_path):
    data = tmp_path / "squad.json"
    entries = [{"question": QUESTION, "answers": [{"text": "Tavik"}]}]
    data.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": entries}]}]}))
    done = kvlink(
        "demo",
        "--model",
        str(checkpoint("qwen2", "bfloat16")),
        "--data",
        str(data),
        "--recipe",
        "raw",
        "--json",
    )
    assert json.loads(done.stdout)["rows"][0]["n"] == 1


def test_ask_and_demo_write_the_story_of_a_transfer(agents, checkpoint, context, tmp_path):
    for name, words in {
        "ask": [
            "ask",
            "--context",
            context,
            "--question",
            QUESTION,
            "--recipe",
            "q2c@0.5 int4",
            *agents.at(),
        ],
        "demo": ["demo", "--model", agents.model, "--n", "1", "--no-prose", "--recipe", "q2c@0.5 int4"],
    }.items():
        file = tmp_path / f"{name}.html"
        done = kvlink(*words, "--report", str(file), "--json")
        assert done.returncode == 0, done.stderr
        html = file.read_text()
        assert 'class="dropped"' in html
        assert 'class="sent"' in html
        assert "q2c@0.5" in html
        assert "receiver: first token" in html
        assert "sender: prefill" in html


def test_the_story_of_a_verified_transfer_has_its_certificate(agents, context, tmp_path):
    file = str(tmp_path / "verified.html")
    words = [
        "ask",
        "--context",
        context,
        "--question",
        QUESTION,
        "--recipe",
        "int8",
        "--verify",
        *agents.at(),
    ]
    done = kvlink(*words, "--report", file, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["certificate"]
    html = Path(file).read_text()
    assert "sender: verify" in html
    assert f"{found['agreeing_tokens']} of {found['tokens']} tokens" in html


def mamba(folder: Path) -> Path:
    """The configuration of a model that keeps no attention cache."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    )
    return folder


def test_agents_stop_gracefully(checkpoint):
    process = start("receiver", "--listen", "127.0.0.1:0", "--model", str(checkpoint("qwen2", "bfloat16")))
    listening(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


BAD = {
    "empty context": (["ask", "--context", "{empty}", "--question", "q"], 2, "the context .* is empty"),
    "no file": (["ask", "--context", "{missing}", "--question", "q"], 2, "cannot read the context"),
    "not UTF-8": (["ask", "--context", "{binary}", "--question", "q"], 2, r"not UTF-8: byte 0xff at 2"),
    "both sources": (
        ["ask", "--context", "x", "--handle", "y", "--question", "q"],
        2,
        "either --context or --handle",
    ),
    "no source": (["ask", "--question", "q"], 2, "either --context or --handle"),
    "bad handle": (["ask", "--handle", "http://x", "--question", "q"], 2, "expected a handle"),
    "bad budget": (["ask", "--context", "{good}", "--question", "q", "--budget", "lots"], 2, "200kB"),
    "recipe, nobody dialled": (
        ["ask", "--context", "{good}", "--question", "q", "--recipe", "q2c@50%"],
        2,
        "50%",
    ),
    "fetch recipe": (["fetch", "kvlink://127.0.0.1:9/x", "-o", "{out}", "--recipe", "zip9"], 2, "zip9"),
    "budget in tokens": (
        ["ask", "--context", "{good}", "--question", "q", "--budget", "5tok"],
        2,
        "expected bytes such as 200kB",
    ),
    "unknown recipe": (["pack", "--context", "{good}", "-o", "{out}", "--recipe", "zip9"], 2, "zip9"),
    "retention 0": (["pack", "--context", "{good}", "-o", "{out}", "--recipe", "q2c@0 int4"], 2, "above 0"),
    "retention 1.5": (
        ["pack", "--context", "{good}", "-o", "{out}", "--recipe", "q2c@1.5 int4"],
        2,
        "at most 1",
    ),
    "no model": (
        ["unpack", "{kvl}", "--question", "q", "--model", "./nowhere"],
        3,
        "no directory and no GGUF file './nowhere'",
    ),
    "no agent": (["health", "127.0.0.1:9"], 4, "nobody listens there"),
    "not a kvl": (["inspect", "{good}"], 5, "not a .kvl file"),
    "truncated kvl": (["inspect", "{cut}"], 5, "TruncatedError"),
    "no kvl": (["inspect", "{missing}"], 2, "cannot read"),
    "off loopback": (["receiver", "--listen", "0.0.0.0:0"], 6, "--insecure"),
    "bad address": (["sender", "--listen", "here"], 2, "host:port"),
    "bad config": (["--config", "{good}", "health", "127.0.0.1:9"], 2, "cannot read the configuration"),
    "report with a handle": (
        ["ask", "--handle", "kvlink://127.0.0.1:9/x", "--question", "q", "--report", "{out}"],
        2,
        "a handle does not open it",
    ),
    "report nowhere": (
        ["ask", "--context", "{good}", "--question", "q", "--report", "/no/such/r.html"],
        2,
        "there is no folder /no/such",
    ),
    "bits without a step": (
        ["pack", "--context", "{good}", "-o", "{out}", "--recipe", "int4", "--bits", "2"],
        2,
        "a recipe with a step",
    ),
    "quality of 2": (["pack", "--context", "{good}", "-o", "{out}", "--quality", "2"], 2, "quality"),
    "no profile": (["profile", "show", "{good}"], 5, "not a profile"),
    "profile of a model that is not there": (
        ["profile", "build", "./nowhere", "-o", "{out}"],
        3,
        "no directory",
    ),
    "unknown table": (["eval", "tables"], 2, "unknown table 'tables'; known: selection, quantization"),
    "unknown data": (["eval", "selection", "--data", "hotpot:x"], 2, "data must be generated"),
    "no data file": (
        ["eval", "selection", "--data", "squad:missing.json"],
        2,
        "cannot read the file of questions missing.json",
    ),
    "cut data": (["eval", "selection", "--data", "squad:{half}"], 2, "is not JSON"),
    "no answerable question": (
        ["eval", "all", "--data", "squad:{unanswered}"],
        2,
        "has no answerable question",
    ),
    "no evidence": (["eval", "all", "--data", "trivia:{unanswered}"], 2, "not in TriviaQA's format"),
    "model without a cache": (["eval", "transfer", "--model", "{mamba}"], 3, "mamba"),
    "eval recipe": (["eval", "recipes", "--recipe", "int5"], 2, "int5"),
    "eval press": (
        ["eval", "selection", "--press", "No!"],
        2,
        "press:NAME needs the name of a kvpress class, got 'No!'",
    ),
    "record of something else": (["eval", "all", "--from", "{good}"], 2, "not the record of a run|not JSON"),
    "window too small": (["eval", "transfer", "--pad-to", "5000"], 2, "the model's window is 2048"),
    "bad data": (["demo", "--data", "{good}"], 2, "not JSON"),
    "bad demo recipe": (["demo", "--recipe", "zip9"], 2, "zip9"),
    "another model": (
        ["unpack", "{kvl}", "--question", "q", "--model", "{other}"],
        3,
        "IdentityError: weights differ",
    ),
    "long question": (
        ["unpack", "{kvl}", "--question", "why " * 700, "--model", "{model}"],
        2,
        "window of 512",
    ),
}


@pytest.fixture(scope="module")
def places(checkpoint, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    unanswered = {"data": [{"paragraphs": [{"context": "C", "qas": [{"question": "Q", "answers": []}]}]}]}
    files = {
        "good": CONTEXT.encode(), "empty": b" \n", "binary": b"ab\xff",
        "half": json.dumps(unanswered).encode()[:40], "unanswered": json.dumps(unanswered).encode(),
    }  # fmt: skip
    found = {name: str(folder / name) for name in (*files, "missing", "out", "kvl", "cut")}
    for name, content in files.items():
        Path(found[name]).write_bytes(content)
    found["model"] = str(checkpoint("qwen2", "bfloat16"))
    found["other"] = str(checkpoint("qwen2", "bfloat16", 1))
    found["mamba"] = str(mamba(folder / "mamba"))
    made = kvlink("pack", "--context", found["good"], "-o", found["kvl"], "--model", found["model"])
    assert made.returncode == 0, made.stderr
    Path(found["cut"]).write_bytes(Path(found["kvl"]).read_bytes()[:-40])
    return found


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_line_and_an_exit_code(name, places):
    arguments, code, message = BAD[name]
    done = kvlink(*(a.format(**places) if "{" in a else a for a in arguments))
    stderr = done.stderr.decode()
    assert done.returncode == code, stderr
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr
    assert done.stdout == b""


def test_a_taken_port_is_reported(agents, checkpoint):
    done = kvlink("receiver", "--listen", agents.receiver, "--model", agents.model)
    assert done.returncode == 2
    assert b"is the port taken" in done.stderr


def test_a_receiver_that_dies_in_mid_delivery_is_reported(checkpoint, context):
    """The sender is told to deliver to a receiver that is killed first."""
    model = str(checkpoint("qwen2", "bfloat16"))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    receiver = start("receiver", "--listen", f"127.0.0.1:{port}", "--model", model)
    sender = start("sender", "--listen", "127.0.0.1:0", "--model", model)
    try:
        listening(receiver)
        address = listening(sender)
        receiver.kill()
        receiver.wait(10)
        began = time.monotonic()
        done = kvlink(
            "ask",
            "--context",
            context,
            "--question",
            QUESTION,
            "--sender",
            address,
            "--receiver",
            f"127.0.0.1:{port}",
        )
        assert done.returncode == 4
        assert b"nobody listens there" in done.stderr
        assert time.monotonic() - began < 40
    finally:
        sender.terminate()
        sender.wait(20)
