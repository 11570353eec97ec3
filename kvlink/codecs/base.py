"""What every codec promises, and the readers that its words share.

Does not know: any one codec. Place on the path: ground floor.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from kvlink.bounds import Rule
from kvlink.errors import RecipeError

PartKind = Literal["map", "scales", "codes", "text"]
PART_KINDS: tuple[PartKind, ...] = ("map", "scales", "codes", "text")
PartCoder = Literal["identity", "zstd", "rans"]
Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")
PartSize = tuple[PartKind, int]
"""Kind and plain bytes of one part."""

AUTO_CALIBRATION, NO_CALIBRATION = "auto", "own"
"""Instead of a calibration's digest: the sender's where it has one; none, statistics travel along."""


class Codec(ABC):
    """How keys and values become parts. Frozen dataclasses of their options; no arithmetic."""

    __slots__ = ()
    CLAIM: ClassVar[str]
    """The word of a recipe that asks for this codec, '' for the one that is taken without."""
    OPTIONS: ClassVar[frozenset[str]]
    """The words that it reads."""
    FIELDS: ClassVar[Mapping[str, Rule]]
    """The rule of each field of its protobuf message."""

    @classmethod
    @abstractmethod
    def read(cls, options: Mapping[str, str]) -> Self:
        """The codec that the words of a recipe describe. Raises RecipeError, naming the word."""

    @abstractmethod
    def words(self) -> list[str]:
        """The full notation, which `read` takes back."""

    @property
    @abstractmethod
    def family(self) -> str:
        """One word for tables and capabilities, such as `int4`."""

    @abstractmethod
    def part_sizes(
        self, layer: int, side: Side, shape: tuple[int, int, int], element_bytes: int, scale_bytes: int
    ) -> list[PartSize]:
        """Parts of a `[H, K, D]` tensor in their order on the wire, sizes before the coder.

        Both ends know them before a byte is taken: coded parts are never larger than plain ones.
        """

    @abstractmethod
    def finer(self) -> Codec | None:
        """The next finer one, None where there is none that is lossy."""

    @property
    def calibration(self) -> str | None:
        """Digest in hex of the calibration that a decoder needs, `AUTO_CALIBRATION` where the sender
        has not said yet, None where none is needed."""
        return None

    @property
    def exact(self) -> bool:
        """Whether decoding gives back every bit."""
        return False


def whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise RecipeError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def require_between(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
