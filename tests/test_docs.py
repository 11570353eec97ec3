"""What the documents show is what happens."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

from kvlink.cli import app
from kvlink.eval.questions import prose
from kvlink.transport.credentials import Credentials
from kvlink.wire import lifecycle, session

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


def anchors(text: str) -> set[str]:
    """What a link may name behind `#`: headings as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            there = path.parent / name if name else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index, path.name


def test_paths_that_the_architecture_page_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+/[\w./-]*)`", text))
    assert len(named) > 30
    for path in sorted(named):  # in full, or without the package's own name
        assert (ROOT / path).exists() or (ROOT / "kvlink" / path).exists(), path


def test_the_architecture_page_shows_both_tables_of_transitions():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert session.diagram() in text
    assert lifecycle.diagram() in text


def test_the_glossary_is_in_the_order_of_the_alphabet():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term.lower() for term in re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)]
    assert len(terms) > 50
    assert terms == sorted(terms)


_PROMPT = "$ "


def shell_lines(text: str) -> list[str]:
    """Commands of fenced shell blocks; in `console` blocks those behind a prompt, since the rest is output."""
    found = []
    for kind, block in re.findall(r"```(sh|bash|console)\n(.*?)```", text, flags=re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "console":
            lines = [line.removeprefix(_PROMPT) for line in lines if line.startswith(_PROMPT)]
        found += [line.partition(" | ")[2] if "| kvlink" in line else line for line in lines]
    return found


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word != "&"]


def parses(words: list[str]) -> bool:
    """Whether the command line takes these words; nothing is run."""
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0] if words else "", words[1:])
    return True


def is_there(words: list[str]) -> bool:
    """Whether a command of a console block exists: its target, its files, its service, its extra."""
    if words[0] == "kvlink":
        return parses(words[1:])
    if words[0] == "make":
        return set(words[1:]) <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if words[0] == "python":
        return words[1] == "-m" or (ROOT / words[1]).is_file()
    if words[:2] == ["docker", "compose"]:
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        return words[2] in ("up", "run") and bool(set(words) & set(services))
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[(.*?)\]", " ".join(words))
        return set(named) <= set(extras) and (
            "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
        )
    return False


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_in_the_documents_exist(path):
    for line in shell_lines(path.read_text(encoding="utf-8")):
        words = words_of(line)
        if words[:1] == ["kvlink"]:
            assert parses(words[1:]), words


def test_every_command_of_the_readme_exists_and_the_first_one_comes_early():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = shell_lines(text)
    assert len(lines) >= 10
    for line in lines:
        assert is_there(words_of(line)), line
    assert text.splitlines().index(_PROMPT + lines[0]) < 25


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
