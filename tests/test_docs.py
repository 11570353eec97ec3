"""What the documents show is what happens."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import typer.main
import yaml

from kvlink.cli import app
from kvlink.eval.questions import prose
from kvlink.transport.credentials import Credentials

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_ten_lines_of_the_readme_run(capsys):
    source = (ROOT / "examples" / "ten_lines.py").read_text()
    body = source.partition("import kvlink\n")[2].strip()
    assert body in (ROOT / "README.md").read_text(), "the README shows examples/ten_lines.py"
    runpy.run_path(str(ROOT / "examples" / "ten_lines.py"))
    answer, cost = capsys.readouterr().out.splitlines()
    assert answer == "cello"
    assert "bits per element" in cost


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def commands(text: str) -> list[list[str]]:
    """Commands in fenced blocks that begin with `kvlink`, as words."""
    import shlex

    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [
        shlex.split(line.partition(" | ")[2] if "| kvlink" in line else line, comments=True) for line in lines
    ]
    return [words[1:] for words in found if words[:1] == ["kvlink"]]


def parses(words: list[str]) -> bool:
    """Whether the command line takes these words; nothing is run."""
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    words = [word for word in words[1:] if word != "&"]
    command.make_context(words[0] if words else "", words)
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_in_the_documents_exist(path):
    for words in commands(path.read_text(encoding="utf-8")):
        assert parses(words), words


def test_compose_runs_commands_that_exist():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    assert set(services) == {"sender", "receiver", "ask"}
    for name in ("sender", "receiver"):
        assert parses(services[name]["command"])
        assert services[name]["healthcheck"]["test"][:2] == ["CMD", "kvlink"]
        assert parses(services[name]["healthcheck"]["test"][2:])
    assert parses([*services["ask"]["entrypoint"][1:], "--question", "Where?"])
    for volume in services["ask"]["volumes"]:
        assert volume.startswith("./certs/") or (ROOT / volume.split(":")[0]).exists()


def test_the_credentials_that_compose_wants_are_those_that_its_first_line_makes(tmp_path, monkeypatch):
    text = (ROOT / "docker-compose.yml").read_text()
    (line,) = [line for line in text.splitlines() if "kvlink certs init" in line]
    monkeypatch.chdir(tmp_path)
    app(line.removeprefix("#").split()[1:], standalone_mode=False)
    for name, service in yaml.safe_load(text)["services"].items():
        folder = Path(service["volumes"][0].split(":")[0])
        told = Credentials(folder).describe()
        assert told["name"] == folder.name
        if name == "ask":
            assert told["dials"] == {"receiver:50052": "receiver", "sender:50051": "sender"}
        else:
            assert told["dials"][service["healthcheck"]["test"][-1]] == name


def test_the_image_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


def test_the_example_context_is_the_projects_prose():
    assert (ROOT / "examples" / "bakery.txt").read_text().strip() == prose()[1].context
