"""Low rank: one layer's keys or values of all heads as the product of two factors, each quantized.

    svd=32 int8

Does not know: tensors. Place on the path: ground floor; arithmetic in `compress.codecs.low_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvlink.bounds import Inner, Rule, Whole
from kvlink.codecs.base import Codec, PartSize, Side, require_between, whole_number
from kvlink.codecs.quantized import Quantized, Quantizer
from kvlink.errors import RecipeError


@dataclass(frozen=True, slots=True)
class LowRank(Codec):
    """`rank` singular values of `[K, Hkv · D]`; less where the matrix has fewer. `factors`: how both
    factors are quantized."""

    rank: int
    factors: Quantized = field(default_factory=Quantized)

    CLAIM: ClassVar[str] = "svd"
    OPTIONS: ClassVar[frozenset[str]] = Quantized.OPTIONS | {"svd"}
    FIELDS: ClassVar[Mapping[str, Rule]] = {"rank": Whole(1, 65_536), "factors": Inner()}

    def __post_init__(self) -> None:
        require_between("svd", self.rank, 1, 65536)
        if self.factors.keys.lossless or self.factors.values.lossless:
            raise RecipeError("svd and lossless exclude each other")

    @classmethod
    def read(cls, options: Mapping[str, str]) -> LowRank:
        quantizers = {name: value for name, value in options.items() if name != "svd"}
        return cls(whole_number("svd", options["svd"]), Quantized.read(quantizers))

    def words(self) -> list[str]:
        return [*self.factors.words(), f"svd={self.rank}"]

    @property
    def family(self) -> str:
        return "svd"

    def rank_of(self, shape: tuple[int, int, int]) -> int:
        """The rank that a `[H, K, D]` tensor is cut to."""
        heads, rows, columns = shape
        return min(self.rank, rows, heads * columns)

    def quantizers(self, layer: int, side: Side) -> tuple[Quantizer, Quantizer]:
        """Quantizers of the factors `[K, R]` and `[R, Hkv · D]`: both share scales within a rank."""
        quantizer = self.factors.of_layer(layer, side)
        return replace(quantizer, axis="channel"), replace(quantizer, axis="token")

    def part_sizes(
        self, layer: int, side: Side, shape: tuple[int, int, int], element_bytes: int, scale_bytes: int
    ) -> list[PartSize]:
        heads, rows, columns = shape
        rank, (left, right) = self.rank_of(shape), self.quantizers(layer, side)
        return [
            *left.part_sizes((1, rows, rank), 4, scale_bytes),
            *right.part_sizes((1, rank, heads * columns), 4, scale_bytes),
        ]

    def finer(self) -> Codec | None:
        """The tensors themselves, with more bits than the factors had."""
        return self.factors.finer() or Quantized()
