"""Configuration as operators meet it: agents that must not run open, commands that say what is not known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kvlink.cli.kinds import Real, Size
from kvlink.transport import certs
from kvlink.transport.certs import Member
from tests.command import CONTEXT, QUESTION, free_address, kvlink
from tests.limits import HANGS_S

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The credentials of a receiver."""
    network = tmp_path_factory.mktemp("net") / "certs"
    certs.begin(network, [Member("reader", "receiver", free_address())])
    return network / "reader"


@pytest.mark.parametrize("said", ["option", "variable", "common variable", "file"])
@pytest.mark.parametrize("other", ["option", "variable", "common variable", "file"])
def test_credentials_and_insecure_exclude_each_other_in_whatever_form_they_come(
    said, other, folder, tmp_path
):
    words, environment, lines = [], {}, ["[receiver]"]
    for form, name, value in ((said, "credentials", str(folder)), (other, "insecure", True)):
        if form == "option":
            words += [f"--{name}", *([value] if isinstance(value, str) else [])]
        elif form == "file":
            lines.append(f"{name} = {json.dumps(value)}")
        else:
            prefix = "KVLINK_" if form.startswith("common") else "KVLINK_RECEIVER_"
            environment[prefix + name.upper()] = value if isinstance(value, str) else "1"
    file = tmp_path / "kvlink.toml"
    file.write_text("\n".join(lines))
    done = kvlink("--config", str(file), "receiver", *words, **environment)
    assert done.returncode == 2, done.stderr
    assert b"exclude each other" in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("form", ["variable", "common variable", "file"])
def test_credentials_that_cannot_be_read_stop_an_agent_in_every_form(form, tmp_path):
    file, environment, missing = tmp_path / "kvlink.toml", {}, str(tmp_path / "nowhere")
    file.write_text(f"[receiver]\ncredentials = {json.dumps(missing)}\n" if form == "file" else "")
    if form != "file":
        prefix = "KVLINK_" if form.startswith("common") else "KVLINK_RECEIVER_"
        environment[prefix + "CREDENTIALS"] = missing
    done = kvlink("--config", str(file), "receiver", "--listen", "127.0.0.1:0", **environment)
    assert done.returncode == 2, done.stderr
    assert b"nowhere" in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_the_entry_points_of_the_services_take_the_same_options_and_file(kind, tmp_path):
    file = tmp_path / "kvlink.toml"
    file.write_text(f"[{kind}]\nmax-hold = '1MB'\n")
    script = str(ROOT / "services" / f"{kind}.py")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, *words], capture_output=True, text=True, timeout=HANGS_S, check=False
        )

    done = run("--config", str(file), "--listen", "127.0.0.1:0")
    assert done.returncode == 2, done.stderr
    assert "did you mean max-held?" in done.stderr
    done = run("--max-held", "nothing")
    assert done.returncode == 2
    assert "--max-held" in done.stderr


def test_a_message_that_nobody_measured_is_said_to_be_one(checkpoint, tmp_path):
    context, file = tmp_path / "context.txt", str(tmp_path / "kept.kvl")
    context.write_text(CONTEXT)
    words = ["pack", "--context", str(context), "--question", QUESTION, "-o", file, "--json"]
    words += ["--model", str(checkpoint("qwen2", "bfloat16"))]
    plain = kvlink(*words)
    assert plain.returncode == 0, plain.stderr
    assert plain.stderr == b""
    assert "int8" in json.loads(plain.stdout)["recipe_full"]
    coarse = kvlink(*words, "--recipe", "transform=1")
    assert coarse.returncode == 0, coarse.stderr
    (warning,) = json.loads(coarse.stdout)["warnings"]
    assert f"kvlink: warning: {warning}" in coarse.stderr.decode()
    for way in ("--verify", "kvlink profile build"):
        assert way in warning
    assert json.loads(kvlink("inspect", file, "--json").stdout)["warnings"] == [warning]


@pytest.mark.parametrize("size", [1, 2**53 + 1, 2**63 - 1])
def test_a_whole_number_of_bytes_is_the_same_as_text_and_as_a_number(size):
    assert Size()(str(size)) == Size()(f"{size}B") == Size().typed(size) == size


def test_what_a_refused_number_may_be_is_said_as_it_is():
    for kind, said in ((Real(most=64, above=True), "above 0, at most 64"), (Real(above=True), "above 0")):
        with pytest.raises(typer.BadParameter, match=f"expected a number {said}, got '0'"):
            kind("0")
