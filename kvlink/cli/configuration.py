"""One name for a setting, in three forms.

The option `--max-held` of `kvlink receiver` is the key `max-held` (or `max_held`) in the table `[receiver]` of
the file that `--config` names, and the variable `KVLINK_RECEIVER_MAX_HELD`; `KVLINK_MAX_HELD` speaks to every
command that has the option. `kvlink profile build` has the table `[profile.build]` and variables that begin with
`KVLINK_PROFILE_BUILD_`. The command line wins over the command's own variable, that over the common one, that
over the file, and the file over the default. A repeated option is a list in the file, and one value or a TOML
array in the environment. Nothing is read from anywhere but the definition of the options.

What no option has is an error in the file, and named on standard error in the environment, which others fill
too. `--config` (`KVLINK_CONFIG`) and `--version` belong to `kvlink` itself and stand in no file.

Does not know: what an option is for. Place on the path: between the forms and the commands.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from kvlink.cli.kinds import File, Flag, Kind, Text
from kvlink.errors import ConfigError
from kvlink.quoting import shown
from kvlink.terminal import note
from kvlink.texts import read_toml

PREFIX = "KVLINK_"
CONFIG = PREFIX + "CONFIG"
OTHERS = {
    PREFIX + "CACHE_DIR": "where what is slow to compute is kept",
    PREFIX + "VERSION": "what images say of themselves",
}
"""Variables that are known and no options."""

_KUBERNETES = re.compile(
    PREFIX + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)",
    re.ASCII,
)
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://", re.ASCII)
_FILE = "kvlink.configuration"

Path_ = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One option of one command. `parameter`: what the command's function calls it."""

    command: Path_
    name: str
    parameter: str
    kind: Kind
    many: bool

    @property
    def variables(self) -> tuple[str, str]:
        """The command's own, then the common one."""
        return _variable(*self.command, self.name), _variable(self.name)

    def read(self, value: Any, where: str, *, typed: bool) -> Any:
        """The parsed value; `typed`: with the type that TOML gave it, not as text.

        Raises ConfigError, naming where it stands.
        """
        read = self.kind.typed if typed else self.kind
        try:
            if not self.many:
                return read(value)
            return [read(item) for item in (value if isinstance(value, list) else [value])]
        except typer.BadParameter as error:
            raise ConfigError(f"{where}: {error.message}") from None


class Command(TyperCommand):
    """A command whose options can stand in the file and in the environment too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--help" not in args:
            path = tuple(_names(ctx))
            found = dict(ctx.find_root().meta.get(_FILE, {}).get(path, {}))
            for setting in settings_of(self, path):
                for variable in reversed(setting.variables):
                    if variable in os.environ:
                        found[setting.parameter] = _from_environment(setting, variable)
            ctx.default_map = found
        return super().parse_args(ctx, args)


def settings_of(command: Any, path: Path_) -> list[Setting]:
    """The options of one command, from its definition; what is only said on the command line is none."""
    kinds = _kinds(inspect.unwrap(command.callback))
    return [
        Setting(path, _name(p), p.name, kinds[p.name], p.multiple)
        for p in command.params
        if p.param_type_name == "option" and p.name in kinds
    ]


def commands_of(group: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every command under a group, with its path."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, (*path, name))
        else:
            yield (*path, name), command


def configure(context: Any, file: Path | None) -> None:
    """Read the file, and name variables of ours that no option has. Raises ConfigError."""
    root = context.command
    if file is None and CONFIG in os.environ:
        file = Setting((), "config", "config", File(), False).read(os.environ[CONFIG], CONFIG, typed=False)
    if file is not None:
        context.meta[_FILE] = read_file(file, root)
    for line in unknown_variables(os.environ, root):
        note(f"kvlink: {line}")


def read_file(file: Path, root: Any) -> dict[Path_, dict[str, Any]]:
    """Values by command and parameter. Raises ConfigError, naming the file, the key and the nearest known one."""
    return dict(_read_group(read_toml(file, "the configuration"), root, (), file))


def unknown_variables(environment: Mapping[str, str], root: Any) -> list[str]:
    """A line for each variable with our prefix that nothing reads; values are not shown."""
    known = {
        name
        for path, command in commands_of(root)
        for s in settings_of(command, path)
        for name in s.variables
    }
    known |= {CONFIG, *OTHERS}
    return [
        f"{shown(name)} in the environment is no option of any command{_nearest(name.upper(), known)}"
        for name in sorted(environment)
        if name.upper().startswith(PREFIX)
        and name not in known
        and not of_kubernetes(name, environment[name])
    ]


def of_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes makes this variable, for a service whose name begins as ours do."""
    return bool(_KUBERNETES.fullmatch(name) or (name.endswith("_PORT") and _KUBERNETES_PORT.match(value)))


def _read_group(
    tables: dict[str, Any], group: Any, path: Path_, file: Path
) -> Iterator[tuple[Path_, dict[str, Any]]]:
    for name, table in tables.items():
        command = group.commands.get(name)
        here = (*path, name)
        if command is None or not isinstance(table, dict):
            what = ".".join((*path, shown(name)))
            said = (
                "a value outside the tables of commands"
                if not isinstance(table, dict)
                else "no command's table"
            )
            raise ConfigError(f"{shown(file)}: {what!r} is {said}{_nearest(name, group.commands)}")
        if hasattr(command, "commands"):
            yield from _read_group(table, command, here, file)
        else:
            yield here, _read_table(table, settings_of(command, here), here, file)


def _read_table(table: dict[str, Any], settings: list[Setting], path: Path_, file: Path) -> dict[str, Any]:
    known, found = {setting.name: setting for setting in settings}, dict[str, Any]()
    for key, value in table.items():
        setting = known.get(key.replace("_", "-"))
        where = f"{shown(file)}: {shown(key)} in [{'.'.join(path)}]"
        if setting is None:
            raise ConfigError(
                f"{where} is no option of 'kvlink {' '.join(path)}'{_nearest(key.replace('_', '-'), known)}"
            )
        if setting.parameter in found:
            raise ConfigError(f"{where} stands there twice, with - and with _")
        found[setting.parameter] = setting.read(value, where, typed=True)
    return found


def _from_environment(setting: Setting, variable: str) -> Any:
    text = os.environ[variable]
    if not (setting.many and text.lstrip().startswith("[")):
        return setting.read(text, variable, typed=False)
    try:
        items = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{variable}: not a list as TOML writes it: {_reason(error)}") from error
    return setting.read(items, variable, typed=True)


@cache
def _kinds(function: Any) -> dict[str, Kind]:
    """How the values of a function's options are read, by parameter."""
    found: dict[str, Kind] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if get_origin(parameter.annotation) is None:
            continue
        annotation, *infos = get_args(parameter.annotation)
        info = next((i for i in infos if isinstance(i, type(typer.Option()))), None)
        if info is not None:
            found[name] = info.parser or (Flag() if annotation is bool else Text())
    return found


def _name(option: Any) -> str:
    return str(max(option.opts, key=len)).removeprefix("--")


def _variable(*words: str) -> str:
    return PREFIX + "_".join(words).upper().replace("-", "_")


def _names(context: Any) -> list[str]:
    """The path of a command, the root's own name left out."""
    return [] if context.parent is None else [*_names(context.parent), context.info_name]


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name[:100], known, 1, 0.5)
    return (
        f"; did you mean {near[0]}?"
        if near
        else f"; known: {', '.join(sorted(known))}"
        if len(known) < 40
        else ""
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return (error.strerror or "") if isinstance(error, OSError) else str(error) or "nested too deeply"
