"""How large, how many and how far whatever a peer sends may be, and the rules that say so.

A rule stands for the values of one field: what is taken, in words that errors and the documentation
print. `kvlink.wire.fields` has the rule of every field of every message. A text that becomes tokens has
a narrower bound that only its model knows: the window's tokens times the bytes of the longest token
(`kvlink.model.room`).

Does not know: messages, models. Place on the path: ground floor; every border reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Unit = Literal["bytes", "characters", "entries"]


@dataclass(frozen=True, slots=True)
class Bound:
    """The most of something that is taken."""

    most: int
    unit: Unit

    def __str__(self) -> str:
        return f"at most {self.most:,} {self.unit}"


MESSAGE = Bound(20_000_000, "bytes")
"""Of one message of a call: a text where the model's window is very long."""
PIECE = Bound(1_000_000, "bytes")
"""Of a profile that travels in pieces."""
TEXT = Bound(16_000_000, "bytes")
"""Of a text that becomes tokens, whatever the model's window is."""
FRAME = Bound(4_000_000, "bytes")
RECIPE = Bound(8_192, "characters")
LAYERS = Bound(4_096, "entries")
TOKENS = Bound(2**24, "entries")
PARTS = Bound(65_536, "entries")
"""Of a segment: a map, and a few for keys and values of each layer."""
SHOWN = Bound(1_000_000, "entries")
"""Tokens of a context that is shown token by token."""
TURNS = Bound(1_024, "entries")
ANSWER = Bound(4_000_000, "bytes")
"""Of all text of an answer: what a peer has generated."""


class Rule(Protocol):
    """The values that a field may have. `str(rule)`: in words."""

    def wrong(self, value: Any) -> str:
        """What is wrong with a value, in a few words; empty where nothing is."""
        ...


def _size(value: str) -> int:
    """UTF-8 bytes; of what is very long the characters will do."""
    return len(value) if len(value) > MESSAGE.most else len(value.encode(errors="surrogatepass"))


@dataclass(frozen=True, slots=True)
class Words:
    """A text of at most `most` bytes of UTF-8; where `like` is given all of it matches that."""

    most: int
    like: str = ""
    named: str = ""

    def __str__(self) -> str:
        return f"at most {self.most:,} bytes of text{f', {self.named}' if self.named else ''}"

    def wrong(self, value: str) -> str:
        size = _size(value)
        if size > self.most:
            return f"{size:,} bytes"
        return "" if not self.like or re.fullmatch(self.like, value) else repr(value)


@dataclass(frozen=True, slots=True)
class Bytes:
    """So many bytes: one of `sizes`, or up to `most`."""

    sizes: tuple[int, ...] = ()
    most: int = 0

    def __str__(self) -> str:
        return f"{' or '.join(map(str, self.sizes))} bytes" if self.sizes else f"at most {self.most:,} bytes"

    def wrong(self, value: bytes) -> str:
        fits = len(value) in self.sizes if self.sizes else len(value) <= self.most
        return "" if fits else f"{len(value):,} bytes"


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def wrong(self, value: int) -> str:
        return "" if self.low <= value <= self.high else str(value)


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def wrong(self, value: float) -> str:
        return "" if math.isfinite(value) and self.low <= value <= self.high else repr(value)


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a closed set of words."""

    allowed: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(word or "(none)" for word in self.allowed)

    def wrong(self, value: str) -> str:
        return "" if value in self.allowed else repr(value[:200])


@dataclass(frozen=True, slots=True)
class Many:
    """At most `most` entries, each by its own rule; messages have theirs."""

    most: int
    each: Rule | None = None

    def __str__(self) -> str:
        return f"at most {self.most:,} entries{f', each {self.each}' if self.each else ''}"

    def wrong(self, value: Collection[Any]) -> str:
        if len(value) > self.most:
            return f"{len(value):,} entries"
        if self.each is None:
            return ""
        return next((f"{what} at {i}" for i, item in enumerate(value) if (what := self.each.wrong(item))), "")


@dataclass(frozen=True, slots=True)
class ByName:
    """Values by name, the names from a closed set."""

    names: tuple[str, ...]
    each: Rule

    def __str__(self) -> str:
        return f"by name ({', '.join(self.names)}), each {self.each}"

    def wrong(self, value: Any) -> str:
        if len(value) > len(self.names):
            return f"{len(value):,} entries"
        for name, item in value.items():
            if name not in self.names:
                return f"the name {name[:200]!r}"
            if what := self.each.wrong(item):
                return f"{name}: {what}"
        return ""


@dataclass(frozen=True, slots=True)
class Inner:
    """A message within a message: its fields have rules of their own."""

    def __str__(self) -> str:
        return "a message"

    def wrong(self, value: Any) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Known:
    """A name of the field's enum, or a truth value: what is not known is refused."""

    def __str__(self) -> str:
        return "a value that is known"

    def wrong(self, value: Any) -> str:
        return ""
