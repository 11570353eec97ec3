"""Sketches: a few numbers of the cache that a model makes of a fixed text, compared by both ends.

    layers      of the model
    numbers     for each of `chosen_layers`, for keys and then for values: log2 of the size (Euclidean norm), and
                `GROUPS` projections relative to it, one for each group of tokens; all in steps of 1/`STEPS`

Two caches that differ by a share of their size have projections that differ by about that share, and sizes that
differ by at most that share. `TOLERANCE` stands between what other hardware does to float32 and what another
model does; docs/decisions/0013-behavioural-probe.md has the figures.

Does not know: models, torch, how a sketch is made (`kvlink.model.probe`). Place on the path: ground floor;
compared before any byte moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvlink.errors import IdentityError

MOST_LAYERS = 8
"""Layers of a model that are sketched."""
GROUPS = 4
STEPS = 4096
TOLERANCE = 0.002
"""The largest difference, as a share of the size, between two sketches of one model."""
MOST_NUMBER = 2**20
_SIDES = ("keys", "values")


class Difference(NamedTuple):
    """How far two sketches are apart at one place, as a share of the size there."""

    layer: int
    side: str
    share: float


@dataclass(frozen=True, slots=True)
class Sketch:
    """The sketch of one model. Raises IdentityError where its numbers are not what one has."""

    layers: int
    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        expected = len(_SIDES) * (1 + GROUPS) * len(chosen_layers(self.layers))
        if self.layers < 1 or len(self.numbers) != expected:
            raise IdentityError(
                f"sketch: expected {expected} numbers for {self.layers} layers, found {len(self.numbers)}"
            )
        if any(not -MOST_NUMBER <= number <= MOST_NUMBER for number in self.numbers):
            raise IdentityError(f"sketch: a number is not within ±{MOST_NUMBER}")

    def differences(self, other: Sketch) -> list[Difference]:
        """Layer by layer, keys before values. Both must be of as many layers.

        Of the groups the second-largest difference counts: where a model chooses experts, a near tie may fall
        the other way on other hardware, which changes one token, and with that one group.
        """
        places = [(layer, side) for layer in chosen_layers(self.layers) for side in _SIDES]
        found = []
        for at, (layer, side) in enumerate(places):
            first, last = at * (1 + GROUPS), (at + 1) * (1 + GROUPS)
            (size, *mine), (their_size, *theirs) = self.numbers[first:last], other.numbers[first:last]
            scale = 2.0 ** ((their_size - size) / STEPS)
            apart = sorted(abs(scale * b - a) / STEPS for a, b in zip(mine, theirs, strict=True))
            found.append(Difference(layer, side, max(abs(scale - 1), apart[-2])))
        return found

    def require_match(self, other: Sketch | None) -> None:
        """Raise IdentityError, naming the layer, where the two models do not make the same cache."""
        if other is None:
            raise IdentityError("the peer tells no sketch of its cache, so its model cannot be compared")
        if other.layers != self.layers:
            raise IdentityError(f"probe: here {self.layers} layers, at the peer {other.layers}")
        apart = self.differences(other)
        beyond = [difference for difference in apart if difference.share > TOLERANCE]
        if beyond:
            first, worst = beyond[0], max(beyond, key=lambda difference: difference.share)
            raise IdentityError(
                f"probe: the caches of a fixed text differ from the {first.side} of layer {first.layer} on "
                f"(of those compared), most in the {worst.side} of layer {worst.layer}: {worst.share:.2%} of their "
                f"size, at most {TOLERANCE:.2%} is one model; configuration, model code or weights are not the same"
            )


def chosen_layers(count: int) -> tuple[int, ...]:
    """Which of `count` layers are sketched: at most `MOST_LAYERS`, evenly spread, the last among them."""
    some = min(count, MOST_LAYERS)
    return tuple((i + 1) * count // some - 1 for i in range(some))


NOT_READ = Sketch(1, (-MOST_NUMBER,) * (len(_SIDES) * (1 + GROUPS)))
"""Of a model that was not read yet; no model has it."""
