"""What the arithmetic of every codec takes beside numbers.

Does not know: any one codec. Place on the path: under the codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvlink.codecs import AUTO_CALIBRATION, Codec
from kvlink.codecs.base import Side
from kvlink.errors import RecipeError
from kvlink.profile import Profile
from kvlink.profile import Side as SideStatistics


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its layer and side, and the positions of its rows, `[H, K]` int64."""

    layer: int
    side: Side
    positions: Tensor


class KeyRotation(Protocol):
    """The rotation of one layer's keys: `[H, K, D]` float64 at `positions` `[H, K]`, with it and without."""

    def on(self, keys: Tensor, positions: Tensor) -> Tensor: ...

    def off(self, keys: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class CodecContext:
    """What both ends know of the model beside a message. Codecs that need none of it take an empty one.

    `rotation`: how the keys of each layer turn at positions 0 … T − 1.
    `units`: for keys and values of each layer the step that the model tolerates in a channel, `[C]` float64,
    of values relative to each other; only an encoder without a calibration needs them.
    """

    rotation: Sequence[KeyRotation] = ()
    calibration: Profile | None = None
    units: tuple[tuple[Tensor, Tensor], ...] = ()

    def statistics(self, codec: Codec, place: Place) -> SideStatistics | None:
        """The calibration's for a tensor, None where the codec uses none. Raises RecipeError where the
        calibration is not the one that the codec names."""
        named = codec.calibration
        if named is None:
            return None
        if self.calibration is None or self.calibration.digest.hex() != named:
            here = self.calibration.digest.hex()[:12] if self.calibration else "none"
            asked = "not named" if named == AUTO_CALIBRATION else named[:12]
            raise RecipeError(f"the recipe needs profile {asked}, here is {here}")
        return self.calibration.side(place.layer, place.side)
