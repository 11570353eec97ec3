"""Tensors that cross between rooms: the KV cache and what the model saw.

The axis letters of the whole package are defined here:

    L layers · Hq query heads · Hkv KV heads · G = Hq / Hkv · T context tokens · K kept tokens
    Q question tokens · W window · D head size · R rank

Does not know: transformers, the wire, recipes. Place on the path: ground floor; the value
between prefill and select, and between restore and generate.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlink.errors import CodecError
from kvlink.payload import CacheShape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer.

    `keys`, `values`: `[Hkv, K, D]`, keys with the rotation of their own position.
    `positions`: `[Hkv, K]` int64, ascending per head, each in [0, T).
    `sliding`: the layer attends to a window of the last tokens only and travels whole.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    sliding: bool = False


@dataclass(frozen=True, slots=True)
class KVCache:
    """The context cache of one sequence, whole or cut down to kept positions.

    `tokens` T is the logical length: the tokens that the cache stands for, and the position of
    the next token.
    """

    layers: tuple[LayerCache, ...]
    tokens: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise CodecError("a cache needs at least one layer, got none")
        heads, _, size = self.layers[0].keys.shape
        for index, layer in enumerate(self.layers):
            kept = layer.positions.shape[-1]
            for side, tensor in (("keys", layer.keys), ("values", layer.values)):
                if tuple(tensor.shape) != (heads, kept, size):
                    raise CodecError(
                        f"layer {index} {side}: expected shape {(heads, kept, size)}, got {tuple(tensor.shape)}"
                    )

    @property
    def shape(self) -> CacheShape:
        """The shape of the full cache that this one was cut from."""
        first = self.layers[0].keys
        dtype = next((name for name, value in DTYPES.items() if value == first.dtype), None)
        if dtype is None:
            raise CodecError(f"cache dtype must be one of {', '.join(DTYPES)}, got {first.dtype}")
        whole = tuple((i, x.keys.shape[1]) for i, x in enumerate(self.layers) if x.sliding)
        return CacheShape(len(self.layers), first.shape[0], self.tokens, first.shape[2], dtype, whole)

    @property
    def whole(self) -> bool:
        """Whether every layer holds all positions that it attends to."""
        return all(layer.sliding or layer.positions.shape[1] == self.tokens for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(x.keys.nbytes + x.values.nbytes + x.positions.nbytes for x in self.layers)

    def require_finite(self) -> None:
        """Raise CodecError, naming layer and side, where a key or value is NaN or infinite.

        One such number makes every answer nonsense.
        """
        for index, layer in enumerate(self.layers):
            for side, tensor in (("keys", layer.keys), ("values", layer.values)):
                if not bool(tensor.isfinite().all()):
                    raise CodecError(f"layer {index} {side}: a number is not finite")

    def wipe(self) -> None:
        """Zero keys and values in place. Whoever shares these tensors loses them too."""
        with torch.inference_mode():
            for layer in self.layers:
                layer.keys.zero_()
                layer.values.zero_()

    def select(self, positions: Tensor) -> KVCache:
        """The cache at `positions`: `[K]` for all heads, or `[L, Hkv, K]`; ascending, int64.

        Layers with a sliding window stay whole. The cache must be a full one.
        """
        return replace(self, layers=tuple(self.layer(index, positions) for index in range(len(self.layers))))

    def layer(self, index: int, positions: Tensor | None) -> LayerCache:
        """One layer at `positions`, given as for `select`; None: as it is."""
        layer = self.layers[index]
        if layer.sliding or positions is None:
            return layer
        heads, _, size = layer.keys.shape
        chosen = positions if positions.ndim == 1 else positions[index]
        chosen = chosen.expand(heads, -1) if chosen.ndim == 1 else chosen
        at = chosen.to(layer.keys.device)[..., None].expand(-1, -1, size)
        return LayerCache(layer.keys.gather(1, at), layer.values.gather(1, at), chosen)

    def others(self, positions: Tensor) -> Tensor:
        """All other positions than `positions`, given as for `select`: `[L, Hkv, T − K]` int64, ascending."""
        layers, heads = len(self.layers), self.layers[0].keys.shape[0]
        sets = positions if positions.ndim == 3 else positions.expand(layers, heads, -1)
        lacking = torch.ones(layers, heads, self.tokens, dtype=torch.bool).scatter_(2, sets, False)
        return lacking.nonzero()[:, 2].reshape(layers, heads, -1)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the model saw: attention that context tokens received, each `[L, Hkv, T]` float32.

    `question`: mean over question tokens and over the query heads of a group. `draft`: the same
    over the tokens of the sender's own short answer. `window`: over the last W context tokens
    (SnapKV), 0 inside the window. `asked_window`: over the last W tokens of context and question
    together. `mass`: accumulated over all context queries (H2O). `press`: scores of a kvpress
    ScorerPress, in its own unit. Layers with a sliding window hold zeros. What was not asked for is None.

    `window_tokens`, `asked_window_tokens`: context tokens inside the window.
    """

    question: Tensor | None = None
    draft: Tensor | None = None
    window: Tensor | None = None
    asked_window: Tensor | None = None
    mass: Tensor | None = None
    press: Tensor | None = None
    question_tokens: int = 0
    draft_tokens: int = 0
    window_tokens: int = 0
    asked_window_tokens: int = 0

    def only(self, names: Collection[str]) -> Evidence:
        """The same without the tensors that are not in `names`: nobody sees more than was asked for."""
        tensors = ("question", "draft", "window", "asked_window", "mass", "press")
        hidden = {name: None for name in tensors if name not in names}
        return replace(self, **hidden)  # type: ignore[arg-type]


def full_positions(heads: int, tokens: int, first: int = 0) -> Tensor:
    """Positions `first … first + tokens - 1` for each head: `[Hkv, K]` int64."""
    return torch.arange(first, first + tokens).expand(heads, -1)
