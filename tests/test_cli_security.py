"""Credentials, staging and load as users meet them: commands, processes, files."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvlink.transport import certs
from kvlink.transport.certs import Member
from tests.command import CONTEXT, QUESTION, free_address, kvlink, listening, start
from tests.limits import HANGS_S


@dataclass
class Network:
    folder: Path
    sender: str
    receiver: str
    metrics: str
    context: str
    receiver_process: subprocess.Popen[str]

    def at(self, name: str) -> list[str]:
        folder = str(self.folder / name)
        return ["--credentials", folder, "--sender", self.sender, "--receiver", self.receiver]


@pytest.fixture(scope="module")
def network(checkpoint, tmp_path_factory) -> Iterator[Network]:
    """Two agents with credentials; the receiver stages, counts, and logs as JSON."""
    folder, model = tmp_path_factory.mktemp("net") / "certs", str(checkpoint("qwen2", "bfloat16"))
    receiver, sender, metrics = (free_address() for _ in range(3))
    done = kvlink(
        "certs", "init", str(folder), "--receiver", f"reader={receiver}", "--sender", f"writer={sender}",
        "--client", "anna", "--client", "bert",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"anna: give it to anna, and to nobody else" in done.stdout
    agents = [
        start(
            "receiver", "--listen", receiver, "--model", model, "--credentials", str(folder / "reader"),
            "--staging", str(folder.parent / "staging"), "--metrics", metrics,
            "--log-level", "info", "--log-format", "json",
        ),
        start("sender", "--listen", sender, "--model", model, KVLINK_CREDENTIALS=str(folder / "writer")),
    ]  # fmt: skip
    context = folder.parent / "context.txt"
    context.write_text(CONTEXT)
    try:
        for agent in agents:
            listening(agent)
        yield Network(folder, sender, receiver, metrics, str(context), agents[0])
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(20)


def test_ask_over_tls(network):
    done = kvlink("ask", *network.at("anna"), "--context", network.context, "--question", QUESTION, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"]


def test_a_handle_opens_for_whom_it_was_published(network):
    anna, bert = (["--credentials", str(network.folder / name)] for name in ("anna", "bert"))
    place = ["--sender", network.sender]
    private = kvlink("publish", *anna, *place, "--context", network.context).stdout.decode().strip()
    shared = (
        kvlink("publish", *anna, *place, "--context", network.context, "--for", "bert")
        .stdout.decode()
        .strip()
    )
    ask = ["--receiver", network.receiver, "--question", QUESTION, "--json"]
    refused = kvlink("ask", *bert, "--handle", private, *ask)
    assert refused.returncode == 6
    assert b"no context with this id" in refused.stderr
    assert kvlink("ask", *bert, "--handle", shared, *ask).returncode == 0
    assert kvlink("unpublish", *anna, private).returncode == 0


def test_an_agent_may_ask_itself_how_it_is(network):
    done = kvlink("health", network.receiver, "--credentials", str(network.folder / "reader"))
    assert done.returncode == 0, done.stderr
    assert b"receiver at" in done.stdout
    assert b"SERVING" in done.stdout


def test_show_tells_who_and_until_when_and_no_secret(network):
    folder = network.folder / "anna"
    done = kvlink("certs", "show", str(folder))
    assert re.match(rb"anna: valid until \d{4}-", done.stdout)
    assert f"dials  {network.sender} as writer".encode() in done.stdout
    told = json.loads(kvlink("certs", "show", str(network.folder / "reader"), "--json").stdout)
    assert told["lets_in"]["anna"] == ["generate"]
    assert told["lets_in"]["writer"] == ["push"]
    secrets = re.findall(r'token(?:_sha256)? = "(.+)"', (folder / certs.PEERS).read_text())
    assert secrets
    assert not [secret for secret in secrets if secret.encode() in done.stdout]


def test_added_peers_and_renewed_certificates_need_no_restart(network):
    assert kvlink("certs", "add", str(network.folder), "--client", "carl").returncode == 0
    renewed = kvlink("certs", "renew", str(network.folder), "--days", "2")
    assert set(re.findall(rb"^(\w+): valid until", renewed.stdout, re.M)) >= {b"anna", b"carl", b"reader"}
    done = kvlink("ask", *network.at("carl"), "--context", network.context, "--question", QUESTION)
    assert done.returncode == 0, done.stderr


def test_metrics_are_there_and_private_files_are_private(network):
    with urllib.request.urlopen(f"http://{network.metrics}/metrics") as answer:
        assert b"kvlink_transfers_total" in answer.read()
    for path in network.folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_every_line_of_a_json_log_is_json_and_names_its_transfer(network):
    """The last test of this file that needs the receiver: it stops it."""
    done = kvlink("ask", *network.at("anna"), "--context", network.context, "--question", QUESTION, "--json")
    transfer = json.loads(done.stdout)["transfer_id"]
    network.receiver_process.terminate()
    _, log = network.receiver_process.communicate(timeout=HANGS_S)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    mine = [line for line in lines if line.get("transfer") == transfer]
    assert [line["message"].partition(":")[0] for line in mine] == ["transfer complete"]
    assert mine[0]["peer"] == "writer"
    assert mine[0]["receipt"]["transfer_id"] == transfer
    assert mine[0]["receipt"]["bytes"]["codes"] > 0
    assert QUESTION not in log
    assert "Tavik" not in log


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    certs.begin(folder / "net", [Member("r", "receiver", "127.0.0.1:9"), Member("a", "client")])
    certs.begin(folder / "old", [Member("r", "receiver", "127.0.0.1:9"), Member("a", "client")], days=-0.01)
    (folder / "file").write_text("x")
    return {name: str(folder / name) for name in ("net", "old", "file", "none")}


BAD = {
    "twice": (["certs", "init", "{net}"], 2, "holds an authority already"),
    "same name": (["certs", "init", "{none}", "--client", "a", "--client", "a"], 2, "a name of its own"),
    "bad name": (["certs", "init", "{none}", "--client", "a/b"], 2, "letters, digits"),
    "no address": (["certs", "init", "{none}", "--receiver", "r"], 2, "expected NAME=HOST:PORT"),
    "add nobody": (["certs", "add", "{net}"], 2, "say whom to add"),
    "add twice": (["certs", "add", "{net}", "--client", "a"], 2, "already"),
    "renew nothing": (["certs", "renew", "{none}"], 2, "holds no authority"),
    "show nothing": (["certs", "show", "{none}"], 2, "no credentials in"),
    "agent without": (["receiver", "--credentials", "{none}"], 2, "no credentials in"),
    "the network itself": (["health", "127.0.0.1:9", "--credentials", "{net}"], 2, "one peer's folder of it: a, r"),
    "expired": (["receiver", "--credentials", "{old}/r"], 6, "expired at .*certs renew"),
    "both": (["receiver", "--credentials", "{net}/r", "--insecure"], 2, "exclude each other"),
    "dial off loopback": (["health", "192.0.2.1:9"], 6, "refusing to dial 192.0.2.1:9 without encryption"),
    "handle off loopback": (
        ["fetch", "kvlink://192.0.2.1:9/x", "-o", "x.kvl"],
        6,
        "refusing to dial",
    ),
    "unlisted": (["health", "127.0.0.1:10", "--credentials", "{net}/a"], 6, "not dialled, and shown nothing"),
    "staging is a file": (["receiver", "--listen", "127.0.0.1:0", "--staging", "{file}"], 2, "cannot stage"),
    "bad log format": (["receiver", "--log-format", "xml"], 2, "text or json"),
    "metrics taken": (["receiver", "--listen", "127.0.0.1:0", "--metrics", "192.0.2.1:9"], 2, "cannot serve metrics"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_line_and_an_exit_code(name, places):
    words, code, message = BAD[name]
    done = kvlink(*(word.format(**places) for word in words))
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.decode().strip().splitlines()
    assert re.search(message, line), line


def test_bench_load_checks_every_answer(tmp_path):
    done = kvlink("bench", "load", "--minutes", "0.1", "--agents", "3", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["answers"] > 0
    assert told["answers_lost"] == told["answers_mixed"] == 0
    assert set(told["total_ms"]) == {"p50", "p95", "p99"}
    assert told["rss_after_bytes"] > 0
