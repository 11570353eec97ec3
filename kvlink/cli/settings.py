"""The settings of an agent as options of the command that runs it.

Does not know: what a setting bounds. Place on the path: between `agent.settings` and the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

from kvlink.agent.settings import About
from kvlink.cli.kinds import AddressText, File, Kind, Real, RecipeText, Size, Text, Whole
from kvlink.cli.options import flag, option

_TYPES: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str, "Path | None": Path | None,
    "tuple[str, ...]": list[str] | None,
}  # fmt: skip
"""Types of settings, as `agent.settings` writes them, and what an option of theirs gives."""


def has_settings(cls: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command takes every setting of `cls` as an option, and gets them by the names of the fields."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [_parameter(f) for f in fields(cls) if "about" in f.metadata]
        command.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
        return command

    return extend


def settings_from(cls: Any, values: dict[str, Any], **more: Any) -> Any:
    """The settings that a command got; lists as tuples."""
    found = {name: tuple(v or ()) if _is_list(cls, name) else v for name, v in values.items()}
    return cls(**found, **more)


def _is_list(cls: Any, name: str) -> bool:
    return any(f.name == name and f.type == "tuple[str, ...]" for f in fields(cls))


def _parameter(f: Field[Any]) -> inspect.Parameter:
    about: About = f.metadata["about"]
    name = about.option or f.name.removesuffix("_bytes").replace("_", "-")
    kind, default = _kind(f, about), list(f.default) if isinstance(f.default, tuple) else f.default
    info = flag(name, about.help) if f.type == "bool" else option(name, kind, about.help, default=default)
    return inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[_TYPES[str(f.type)], info],
    )


def _kind(f: Field[Any], about: About) -> Kind:
    if f.name.endswith("_bytes"):
        return Size(int(about.least), zero=about.least == 0)
    if f.name.endswith("_address"):
        return AddressText(empty=True)
    if f.name.endswith("_recipe"):
        return RecipeText()
    if f.name.endswith("_s"):
        return Real(about.least, name="seconds")
    return {"int": Whole(int(about.least)), "float": Real(about.least), "Path | None": File()}.get(
        str(f.type), Text()
    )
