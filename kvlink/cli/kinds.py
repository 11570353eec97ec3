"""How the value of an option is read, the same from the command line, the environment and a TOML file.

A kind takes text, or a value as TOML has it, and gives the value that a command gets. It refuses numbers
that are none (`nan`, `inf`), digits of other scripts, and what is out of range, before anything is loaded.

Does not know: which option it serves. Place on the path: under the options.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import typer

from kvlink.errors import InputError
from kvlink.quoting import shown
from kvlink.recipe import AUTO, Recipe
from kvlink.transport.address import Address

MOST_COUNT, MOST_BYTES, MOST_SECONDS = 2**31 - 1, 2**63 - 1, 1e8
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Kind(ABC):
    """Reads one value. `expected`: what it takes, in words; `types`: as TOML may have it.

    Raises typer.BadParameter.
    """

    expected: str
    types: tuple[type, ...] = (str,)

    def __init__(self, name: str) -> None:
        self.__name__ = name
        """What help shows in place of a value."""

    @abstractmethod
    def _read(self, value: Any) -> Any:
        """The value, or None where it is not one of this kind."""

    def __call__(self, value: Any) -> Any:
        found = self._read(value)
        if found is None:
            raise typer.BadParameter(f"expected {self.expected}, got {_quoted(value)}")
        return found

    def typed(self, value: Any) -> Any:
        """The same from a value that has a type already: no number in quotes, no text without."""
        if type(value) not in self.types:
            raise typer.BadParameter(f"expected {self.expected}, got {_quoted(value)}")
        return self(value)

    def shown(self, value: Any) -> str:
        """A default as help shows it."""
        return str(value)


class Text(Kind):
    """Any text."""

    expected = "text"

    def __init__(self, name: str = "text") -> None:
        super().__init__(name)

    def _read(self, value: Any) -> str | None:
        return value if isinstance(value, str) else None


class File(Kind):
    """A path; an empty one is none."""

    expected = "a path"

    def __init__(self, name: str = "path") -> None:
        super().__init__(name)

    def _read(self, value: Any) -> Path | None:
        if isinstance(value, Path):
            return value
        return Path(value) if isinstance(value, str) and value and "\0" not in value else None


class Choice(Kind):
    """One of a few words; `empty`: or none."""

    def __init__(self, *words: str, empty: bool = False) -> None:
        super().__init__("|".join(words))
        self._words = (*words, "") if empty else words
        self.expected = " or ".join((", ".join(words[:-1]), words[-1]))

    def _read(self, value: Any) -> str | None:
        word = value.lower() if isinstance(value, str) else None
        return word if word in self._words else None


class Flag(Kind):
    """Yes or no; the command line says so with the option or its `--no-` form."""

    expected = "true or false"
    types = (bool,)

    def __init__(self) -> None:
        super().__init__("flag")

    def _read(self, value: Any) -> bool | None:
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else ""
        return True if word in _YES else False if word in _NO else None


class Whole(Kind):
    """A whole number from `least` to `most`."""

    types = (int,)

    def __init__(self, least: int = 0, most: int = MOST_COUNT) -> None:
        super().__init__("number")
        self.least, self.most = least, most
        self.expected = f"a whole number {_span(least, most, MOST_COUNT)}"

    def _read(self, value: Any) -> int | None:
        if isinstance(value, str) and re.fullmatch("[+-]?[0-9]{1,20}", value):
            value = int(value)
        good = isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most
        return value if good else None


class Real(Kind):
    """A finite number from `least` (`above`: larger than it) to `most`."""

    types = (int, float)

    def __init__(
        self, least: float = 0.0, most: float = MOST_SECONDS, *, above: bool = False, name: str = "number"
    ) -> None:
        super().__init__(name)
        self.least, self.most, self._above = least, most, above
        self.expected = f"a number {_span(least, most, MOST_SECONDS, above)}"

    def _read(self, value: Any) -> float | None:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        if not self.least <= value <= self.most or (self._above and value == self.least):
            return None  # what is no number compares as false
        return float(value)


class Seconds(Real):
    """Seconds, at least `least`."""

    def __init__(self, least: float = 0.0) -> None:
        super().__init__(least, name="seconds")


class Size(Kind):
    """Bytes: `200kB`, `1.5MB`, `8GB`, or a plain number of bytes. `zero`: or none at all (0, or no text)."""

    types = (int, str)
    _UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))

    def __init__(self, least: int = 1, *, zero: bool = False) -> None:
        super().__init__("bytes")
        self.least, self._zero = least, zero
        self.expected = f"bytes such as 200kB, 1.5MB or 8GB, {_span(least, MOST_BYTES, MOST_BYTES)}"

    def _read(self, value: Any) -> int | None:
        if self._zero and value in ("", 0) and not isinstance(value, bool):
            return 0
        if isinstance(value, str):
            unit = next((u for u, _ in self._UNITS if value.endswith(u)), "")
            number = value.removesuffix(unit)
            if not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
                return None
            digits = (
                int(number) if number.isdecimal() else float(number)
            )  # all digits of a whole number count
            value = round(digits * dict(self._UNITS).get(unit, 1))
        good = isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= MOST_BYTES
        return value if good else None

    def shown(self, value: Any) -> str:
        for unit, factor in self._UNITS[:-1]:
            if value and value % factor == 0:
                return f"{value // factor}{unit}"
        return str(value)


class AddressText(Kind):
    """host:port; `empty`: or none. `listening`: port 0 picks one."""

    expected = "an address as host:port"

    def __init__(self, *, empty: bool = False, listening: bool = False) -> None:
        super().__init__("host:port")
        self._empty, self._listening = empty, listening

    def _read(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return None
        if value or not self._empty:
            try:
                Address.parse(value, listening=self._listening)
            except InputError as error:
                raise typer.BadParameter(str(error)) from None
        return value


class MemberText(Kind):
    """Who is at which address, `sender=10.0.0.5:50051`."""

    expected = "NAME=HOST:PORT"

    def __init__(self) -> None:
        super().__init__("name=host:port")
        self._address = AddressText()

    def _read(self, value: Any) -> str | None:
        name, _, address = value.partition("=") if isinstance(value, str) else ("", "", "")
        return f"{name}={self._address(address)}" if name and address else None


class RecipeText(Kind):
    """A recipe, as it was given; refused before anybody is dialled or a model is loaded. `auto` too."""

    def __init__(self, *, empty: bool = False) -> None:
        super().__init__("recipe")
        self._empty, self.expected = empty, "a recipe"

    def _read(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return None
        if value != AUTO and (value or not self._empty):
            try:
                Recipe.parse(value)
            except InputError as error:
                raise typer.BadParameter(str(error)) from None
        return value


def _span(least: float, most: float, unbounded: float, above: bool = False) -> str:
    if above:
        return f"above {least:g}" if most == unbounded else f"above {least:g}, at most {most:g}"
    return f"of at least {least:g}" if most == unbounded else f"from {least:g} to {most:g}"


def _quoted(value: Any) -> str:
    return shown(repr(value)) if isinstance(value, str) else f"{shown(value)} ({type(value).__name__})"
