"""The transform codec: decorrelated coefficients, one step, entropy coded.

    transform=1    transform=0.25 basis=own

Does not know: tensors, calibrations. Place on the path: ground floor; arithmetic in
`compress.codecs.transform`, formulas in `docs/codec.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from kvlink.bounds import Rule, Whole, Words
from kvlink.codecs.base import (
    AUTO_CALIBRATION,
    NO_CALIBRATION,
    Codec,
    PartSize,
    Side,
    require_between,
)
from kvlink.codecs.quantized import Quantized
from kvlink.errors import RecipeError

STEP_CODES = (-40, 40)
"""Range of a step as 4 · log2: from 1/1024 to 1024."""

_FINER_CODES = 4
_FINEST_CODE = -16
"""Finer steps than 1/16 cost more than the numbers as they are."""


@dataclass(frozen=True, slots=True)
class Transform(Codec):
    """A step of 2^(`step_code` / 4) times what the model is thought to tolerate.

    `basis`: `auto` (the sender's calibration where it has one), `own` (none: statistics travel with
    the message), or the calibration's digest, 32 hex digits.
    """

    step_code: int
    basis: str = AUTO_CALIBRATION

    CLAIM: ClassVar[str] = "transform"
    OPTIONS: ClassVar[frozenset[str]] = frozenset({"transform", "basis"})
    FIELDS: ClassVar[Mapping[str, Rule]] = {
        "step_code": Whole(*STEP_CODES),
        "basis": Words(32, r"(own|[0-9a-f]{32})?", "own, 32 hex digits or none"),
    }

    def __post_init__(self) -> None:
        if self.basis not in (AUTO_CALIBRATION, NO_CALIBRATION) and not re.fullmatch(
            "[0-9a-f]{32}", self.basis
        ):
            raise RecipeError(f"basis must be auto, own or a profile's 32 hex digits, got {self.basis!r}")
        require_between("transform", self.step_code, *STEP_CODES)

    @classmethod
    def read(cls, options: Mapping[str, str]) -> Transform:
        return cls(step_code("transform", options["transform"]), options.get("basis", AUTO_CALIBRATION))

    def words(self) -> list[str]:
        basis = [] if self.basis == AUTO_CALIBRATION else [f"basis={self.basis}"]
        return [f"transform={step_of(self.step_code):.4g}", *basis]

    @property
    def family(self) -> str:
        return "transform/own" if self.basis == NO_CALIBRATION else "transform"

    @property
    def calibration(self) -> str | None:
        return None if self.basis == NO_CALIBRATION else self.basis

    def part_sizes(
        self, layer: int, side: Side, shape: tuple[int, int, int], element_bytes: int, scale_bytes: int
    ) -> list[PartSize]:
        heads, rows, columns = shape
        codes: PartSize = ("codes", 4 * heads * rows * columns)
        # Without a calibration the mean, step and spread of every channel travel along.
        own: PartSize = ("scales", heads * columns * (scale_bytes + 2))
        return [own, codes] if self.basis == NO_CALIBRATION else [codes]

    def finer(self) -> Codec | None:
        """Half the step; the numbers as they are after the finest."""
        if self.step_code <= _FINEST_CODE:
            return Quantized()
        return replace(self, step_code=max(_FINEST_CODE, self.step_code - _FINER_CODES))


def step_of(code: int) -> float:
    """The step that a code stands for: codes are a quarter of an octave apart, 0 is a step of 1."""
    return float(2 ** (code / 4))


def step_code(name: str, text: str) -> int:
    """The code of the step nearest to `text`."""
    try:
        step = float(text)
    except ValueError:
        raise RecipeError(f"{name} must be a step such as 1 or 1.5, got {text!r}") from None
    if not step_of(STEP_CODES[0]) <= step <= step_of(STEP_CODES[1]):
        raise RecipeError(f"{name} must be a step from 1/1024 to 1024, got {text!r}")
    return round(4 * math.log2(step))
