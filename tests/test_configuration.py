"""One name for a setting, in three forms: the option, the key of a TOML file, the variable.

The tables here are made from the definition of the commands, so that a new option is covered when it is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.cli import app
from kvlink.cli.configuration import (
    Command,
    Setting,
    commands_of,
    of_kubernetes,
    read_file,
    settings_of,
    unknown_variables,
)
from kvlink.cli.kinds import (
    AddressText,
    Choice,
    File,
    Flag,
    Kind,
    MemberText,
    Real,
    RecipeText,
    Size,
    Text,
    Whole,
)
from kvlink.errors import ConfigError
from kvlink.wire.session import Limits

ROOT = typer.main.get_command(app)
COMMANDS: dict[tuple[str, ...], Any] = dict(commands_of(ROOT))
SETTINGS = [setting for path, command in COMMANDS.items() for setting in settings_of(command, path)]


def name_of(setting: Setting) -> str:
    return f"{'-'.join(setting.command)}-{setting.name}"


def sample(kind: Kind, default: Any) -> tuple[str, Any]:
    """A value as the command line has it and as TOML has it; not the default."""
    if isinstance(kind, Flag):
        return str(not default).lower(), not default
    if isinstance(kind, Choice):
        word = next(w for w in kind.__name__.split("|") if w != default)
        return word, word
    if isinstance(kind, (Whole, Real)):
        steps = (1, 2) if isinstance(kind, Whole) else (0.5, 0.25)
        number = next(n for n in (kind.least + step for step in steps) if n != default and n <= kind.most)
        return str(number), number
    for cls, word in (
        (AddressText, "127.0.0.1:7"), (RecipeText, "int3"), (MemberText, "a=h:7"), (Size, "3MB"),
        (File, "some/place"), (Text, "a b"),
    ):  # fmt: skip
        if isinstance(kind, cls):
            return word, word
    raise AssertionError(f"no sample of {kind}")


@pytest.fixture(autouse=True)
def _nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("KVLINK_"):
            monkeypatch.delenv(name)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`parse(path, arguments, toml, **environment)`: what the command gets; nothing is run."""

    def get(
        path: tuple[str, ...], arguments: list[str], toml: str = "", **environment: str
    ) -> dict[str, Any]:
        command, got = COMMANDS[path], dict[str, Any]()
        before = ["--config", str(tmp_path / "kvlink.toml")] if toml else []
        (tmp_path / "kvlink.toml").write_text(toml)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(Command, "invoke", lambda _, ctx: got.update(ctx.params))
            ROOT.main([*before, *path, *arguments, *placeholders(command)], standalone_mode=False)
        return got

    return get


def placeholders(command: Any) -> list[str]:
    """Something for each positional argument."""
    return ["127.0.0.1:1" for p in command.params if p.param_type_name == "argument"]


def others(setting: Setting) -> list[str]:
    """What else the command must be given."""
    command = COMMANDS[setting.command]
    return [
        word
        for s in settings_of(command, setting.command)
        for p in command.params
        if p.name == s.parameter and p.required and s is not setting and s.name != setting.name
        for word in (f"--{s.name}", "needed")
    ]


def default_of(setting: Setting) -> Any:
    return next(p.default for p in COMMANDS[setting.command].params if p.name == setting.parameter)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_an_option_is_the_same_on_the_command_line_in_the_file_and_in_the_environment(setting, parse):
    path, needed, default = setting.command, others(setting), default_of(setting)
    text, value = sample(setting.kind, default)
    words = [f"--{setting.name}" if value is True else f"--no-{setting.name}"] if isinstance(value, bool) else [
        f"--{setting.name}", text,
    ]  # fmt: skip

    def got(*arguments: str, toml: str = "", **environment: str) -> Any:
        return parse(path, [*needed, *arguments], toml, **environment)[setting.parameter]

    said = got(*words)
    if not any(p.required for p in COMMANDS[path].params if p.name == setting.parameter):
        assert (got() or None) == (default or None)
    assert said != default
    table, key = ".".join(path), setting.name
    assert got(toml=f"[{table}]\n{key} = {json.dumps(value)}\n") == said
    assert got(toml=f"[{table}]\n{key.replace('-', '_')} = {json.dumps(value)}\n") == said
    for variable in setting.variables:
        assert got(**{variable: text}) == said, variable


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.many], ids=name_of)
def test_a_repeated_option_is_a_list(setting, parse):
    value = sample(setting.kind, None)[1]
    second = {RecipeText: "int8", MemberText: "b=h:8"}.get(type(setting.kind), "other")
    pair = [value, second]
    path, name, needed = setting.command, setting.parameter, others(setting)
    said = parse(path, [*needed, *(w for item in pair for w in (f"--{setting.name}", item))])[name]
    assert len(said) == 2
    assert parse(path, needed, f"[{'.'.join(path)}]\n{setting.name} = {json.dumps(pair)}\n")[name] == said
    assert parse(path, needed, **{setting.variables[0]: json.dumps(pair)})[name] == said


def test_the_nearer_form_wins(parse):
    path, toml = ("receiver",), "[receiver]\nmax-held = '1MB'\n"
    own, common = {"KVLINK_RECEIVER_MAX_HELD": "2MB"}, {"KVLINK_MAX_HELD": "3MB"}
    assert parse(path, [], toml)["max_held_bytes"] == 1_000_000
    assert parse(path, [], toml, **common)["max_held_bytes"] == 3_000_000
    assert parse(path, [], toml, **common, **own)["max_held_bytes"] == 2_000_000
    assert parse(path, ["--max-held", "4MB"], toml, **common, **own)["max_held_bytes"] == 4_000_000
    assert parse(path, ["--no-insecure"], "[receiver]\ninsecure = true\n")["insecure"] is False


def test_every_setting_of_an_agent_is_an_option():
    for path, cls in ((("receiver",), ReceiverSettings), (("sender",), SenderSettings)):
        options = {s.parameter for s in settings_of(COMMANDS[path], path)}
        values = {f.name for f in dataclasses.fields(cls)}
        assert values - options == {"credentials"}  # "creds", the folder


def test_every_limit_of_a_session_is_a_setting_of_the_receiver():
    assert ReceiverSettings().limits == Limits()


def test_every_command_takes_its_options_from_all_three_forms():
    for path, command in COMMANDS.items():
        assert isinstance(command, Command), path


def test_every_number_has_a_kind_that_refuses_what_is_none():
    for setting in SETTINGS:
        default = default_of(setting)
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert isinstance(setting.kind, (Whole, Real, Size)), name_of(setting)


def test_no_variable_means_two_things():
    """A command's own variable is no other's common one, and none looks like those of Kubernetes."""
    own = {s.variables[0]: s for s in SETTINGS}
    assert len(own) == len(SETTINGS)
    assert not set(own) & {s.variables[1] for s in SETTINGS}
    assert not [v for s in SETTINGS for v in s.variables if of_kubernetes(v, "tcp://10.0.0.1:50051")]


REFUSED = {
    "an unknown key": ("[receiver]\nmax-hold = '1MB'\n", "max-hold in [receiver]", "did you mean max-held?"),
    "an unknown key, _": (
        "[receiver]\nmax_hold = '1MB'\n",
        "max_hold in [receiver]",
        "did you mean max-held?",
    ),
    "a misspelt command": ("[reciever]\n", "'reciever' is no command's table", "did you mean receiver?"),
    "a misspelt command under another": ("[profile.bild]\n", "'profile.bild'", "did you mean build?"),
    "an option of another command": (
        "[receiver]\nmax-reads = 2\n",
        "max-reads in [receiver]",
        "no option of",
    ),
    "a value outside any table": ("json = true\n", "'json'", "outside the tables"),
    "a value under a group": ("[profile]\nn = 3\n", "'profile.n'", "outside the tables"),
    "a table in place of a value": ("[receiver.listen]\nhost = 'a'\n", "listen in [receiver]", "host:port"),
    "a positional argument": ("[inspect]\nfile = 'x'\n", "file in [inspect]", "no option"),
    "a key twice": ("[receiver]\nmax-held = '1MB'\nmax_held = '2MB'\n", "max_held in [receiver]", "twice"),
    "version": ("[inspect]\nversion = true\n", "version in [inspect]", "no option"),
    "a number in quotes": ("[receiver]\nmax-transfers = '4'\n", "max-transfers in [receiver]", "'4'"),
    "a whole number with a point": ("[receiver]\nmax-transfers = 4.0\n", "max-transfers", "4.0 (float)"),
    "a flag in quotes": ("[inspect]\njson = 'true'\n", "json in [inspect]", "true or false"),
    "a flag as a number": ("[inspect]\njson = 1\n", "json in [inspect]", "true or false"),
    "true as a number": ("[receiver]\nmax-transfers = true\n", "max-transfers", "True (bool)"),
    "a number as a text": ("[receiver]\nmodel = 3\n", "model in [receiver]", "expected text"),
    "a list for one": ("[receiver]\nmodel = ['a']\n", "model in [receiver]", "expected text"),
    "a number in a list": ("[sender]\npeer = ['a:1', 2]\n", "peer in [sender]", "expected text"),
    "a date": ("[receiver]\nlisten = 1979-05-27\n", "listen in [receiver]", "date"),
    "an empty path": ("[receiver]\ncredentials = ''\n", "credentials in [receiver]", "a path"),
    "not a number": ("[receiver]\nwait-s = nan\n", "wait-s in [receiver]", "nan"),
    "no end": ("[receiver]\nwait-s = inf\n", "wait-s in [receiver]", "inf"),
    "below zero": ("[receiver]\nmax-held = -1\n", "max-held in [receiver]", "-1"),
    "no TOML": ("[receiver\n", "cannot read the configuration", "line 1"),
    "nested without end": ("x = " + "[" * 100_000, "cannot read the configuration", "kvlink.toml"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", [("receiver",), ("inspect",)], ids="-".join)
def test_what_the_file_should_not_say_is_refused_by_name_whatever_command_runs(name, command, parse):
    toml, what, why = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        parse(command, [], toml)
    for part in ("kvlink.toml", what, why):
        assert part in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff", b"\xff\xfez", None], ids=["not UTF-8", "not UTF-16", "no file"])
def test_a_file_that_cannot_be_read_is_refused(content, tmp_path):
    file = tmp_path / "kvlink.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the configuration .*kvlink\.toml"):
        ROOT.main(["--config", str(file), "models", "list"], standalone_mode=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVLINK_RECEIVER_MAX_TRANSFERS", "many"), ("KVLINK_MAX_TRANSFERS", ""), ("KVLINK_WAIT_S", "nan"),
        ("KVLINK_WAIT_S", "１"), ("KVLINK_MAX_HELD", "-1MB"), ("KVLINK_MAX_HELD", "1e400MB"),
        ("KVLINK_INSECURE", "maybe"), ("KVLINK_INSECURE", ""), ("KVLINK_CREDENTIALS", ""),
        ("KVLINK_RECEIVER_LISTEN", "here"), ("KVLINK_LOG_LEVEL", "loud"),
    ],
)  # fmt: skip
def test_a_variable_of_the_wrong_type_is_refused_by_name(name, value, parse):
    with pytest.raises(ConfigError, match=name):
        parse(("receiver",), [], **{name: value})
    parse(("inspect",), [], **{name: value})  # no option of this command


def test_the_file_can_be_named_in_the_environment(parse, tmp_path):
    file = tmp_path / "other.toml"
    file.write_text("[receiver]\nmax-transfers = 3\n")
    assert parse(("receiver",), [], KVLINK_CONFIG=str(file))["max_transfers"] == 3
    with pytest.raises(ConfigError, match="KVLINK_CONFIG"):
        parse(("receiver",), [], KVLINK_CONFIG="")


def test_an_unknown_variable_is_named_and_breaks_nothing(parse, capsys):
    parse(("inspect",), [], KVLINK_INSPECT_JSNO="1", KVLINK_RECEIVER_CREDENTIAL="secret", kvlink_model="x")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "KVLINK_INSPECT_JSNO" in lines[0]
    assert "did you mean KVLINK_INSPECT_JSON?" in lines[0]
    assert "did you mean KVLINK_RECEIVER_CREDENTIALS?" in lines[1]
    assert "did you mean KVLINK_MODEL?" in lines[2]
    assert "secret" not in "".join(lines)


def test_what_others_put_into_the_environment_is_not_ours(parse, capsys):
    theirs = {
        "KVLINK_PORT": "tcp://10.0.0.1:50051", "KVLINK_SENDER_PORT": "tcp://10.0.0.1:50051",
        "KVLINK_SENDER_SERVICE_HOST": "10.0.0.1", "KVLINK_SENDER_SERVICE_PORT": "50051",
        "KVLINK_SENDER_SERVICE_PORT_GRPC": "50051", "KVLINK_SENDER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "KVLINK_SENDER_PORT_50051_TCP_PROTO": "tcp", "KVLINK_SENDER_PORT_50051_TCP_PORT": "50051",
        "KVLINK_SENDER_PORT_50051_TCP_ADDR": "10.0.0.1", "KVLINK_VERSION": "0.1.0",
    }  # fmt: skip
    plain = {path: parse(path, []) for path in (("sender",), ("inspect",))}
    assert {path: parse(path, [], **theirs) for path in plain} == plain
    assert capsys.readouterr().err == ""
    parse(("inspect",), [], KVLINK_SENDER_PORT="50051")
    assert "KVLINK_SENDER_PORT" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.1.0", "1", "true", ""])
def test_a_version_in_the_environment_is_not_the_option(version, parse):
    assert parse(("inspect",), [], KVLINK_VERSION=version) == parse(("inspect",), [])


NUMBERS = [
    pytest.param(setting, value, id=f"{name_of(setting)}-{value}")
    for setting in SETTINGS if isinstance(setting.kind, (Whole, Real, Size))
    for value in ("nan", "inf", "-inf", "-1", "1e400", "1_0", "²", "٣", "0x1", "", " 1", "1 ")
    if value or default_of(setting) != 0 or not isinstance(setting.kind, Size)  # no text is no share of one's own
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), NUMBERS)
def test_a_number_that_is_none_is_refused_in_every_form(setting, value, parse):
    with pytest.raises(typer.BadParameter, match="expected"):
        parse(setting.command, [*others(setting), f"--{setting.name}={value}"])
    with pytest.raises(ConfigError, match=setting.variables[0]):
        parse(setting.command, others(setting), **{setting.variables[0]: value})
    table = ".".join(setting.command)
    with pytest.raises(ConfigError, match=setting.name):
        parse(setting.command, others(setting), f"[{table}]\n{setting.name} = {json.dumps(value)}\n")
    if value in ("nan", "inf", "-inf", "-1"):
        with pytest.raises(ConfigError, match=setting.name):
            parse(setting.command, others(setting), f"[{table}]\n{setting.name} = {value}\n")


DOCUMENTS = [
    *(
        Path(__file__).resolve().parent.parent / name
        for name in ("README.md", "docker-compose.yml", "Dockerfile")
    ),
    *sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_variables_and_files_in_the_documents_are_what_commands_read(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    named = dict.fromkeys(re.findall(r"KVLINK_[A-Z]\w*[A-Z]", text), "tcp://10.0.0.1:50051")
    assert unknown_variables(named, ROOT) == []
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        assert "dial" in block or read_file(file, ROOT)  # peers.toml is another file
