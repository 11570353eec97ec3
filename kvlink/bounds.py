"""How large whatever a peer sends may be: one table, checked before anything is parsed or cut into tokens.

A text that becomes tokens has a bound of its own, which only its model knows: the window's tokens times
the bytes of the longest token (`kvlink.model.room`). Everything else is here, with the words that the
documentation prints.

Does not know: messages, models. Place on the path: ground floor; every border reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["bytes", "characters", "entries", "tokens"]


@dataclass(frozen=True, slots=True)
class Bound:
    """The most of something that is taken. `what`: which fields, in the words of the documentation."""

    most: int
    unit: Unit
    what: str

    def __str__(self) -> str:
        return f"at most {self.most:,} {self.unit}"


TEXT = Bound(16_000_000, "bytes", "context, question, earlier turns: where the model's window allows more")
RECIPE = Bound(8_192, "characters", "a recipe as text")
LAYERS = Bound(4_096, "entries", "layers of a cache, layers with quantizers of their own, whole layers")
