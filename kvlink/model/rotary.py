"""Rotations: how a model turns its keys by position, found by trying, and put on and off.

Families differ in which channels make a pair (halves, neighbours), how many of them turn (partial rotary), where
these stand, whether a table has one entry a channel or one a pair, and which layers turn at all. Names do
not tell; the model does. Single tokens are read, each alone at a position of its own: nothing but the rotation
tells their keys apart, so an arrangement is the model's own where all unrotated keys are the one at position 0,
which has no rotation. Positions reach to the end of the window.

Does not know: codecs. Place on the path: beside it; both ends put rotations on and off.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["halves", "neighbours"]
_PLACES = 24
_TABLE = "embed_positions"
"""How GPT-J and its kin call the table of sines and cosines at each attention layer."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Most deviation of an unrotated key, as a share of the largest channel: what the dtype rounds away."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of one layer: pair i of channels `first[i]`, `second[i]` turns by the angle of its position.

    `cosine`, `sine`: `[T, N]` float32, a scaling of the rotation (YaRN) in them. N 0: keys are not turned.
    """

    cosine: Tensor
    sine: Tensor
    first: Tensor
    second: Tensor

    def on(self, keys: Tensor, positions: Tensor) -> Tensor:
        """`[H, K, D]` float64 with the rotation of `positions` `[H, K]` put on. Other channels stay."""
        return self._turned(keys, self.cosine.double()[positions], self.sine.double()[positions])

    def off(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Undo `on`."""
        cosine, sine = self.cosine.double()[positions], self.sine.double()[positions]
        scale = cosine.square() + sine.square()
        return self._turned(keys, cosine, -sine, scale)

    def _turned(self, keys: Tensor, cosine: Tensor, sine: Tensor, scale: Tensor | None = None) -> Tensor:
        if not len(self.first):
            return keys
        first, second = keys[..., self.first], keys[..., self.second]
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        out = keys.clone()
        out[..., self.first], out[..., self.second] = turned if scale is None else (t / scale for t in turned)
        return out


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where a layer's rotation comes from: `source` names a module or a table of the model, "" for none.

    `layer_type`: what the module is asked for. `start`: the first channel that turns. `backwards`: by the
    negative angle.
    """

    source: str = ""
    layer_type: str = ""
    layout: Layout = "halves"
    start: int = 0
    backwards: bool = False

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Channels `[N]` that are first and second in their pair."""
        if self.layout == "halves":
            first = torch.arange(self.start, self.start + count)
            second = first + count
        else:
            first = torch.arange(self.start, self.start + 2 * count, 2)
            second = first + 1
        return (second, first) if self.backwards else (first, second)


def rotations(model: Any, arrangements: Sequence[Arrangement], tokens: int) -> tuple[Rotation, ...]:
    """The rotation of each layer at positions 0 … tokens − 1, from the model's own tables."""
    made: dict[Arrangement, Rotation] = {}
    for arrangement in dict.fromkeys(arrangements):
        if arrangement.source:
            cosine, sine = _table(model, arrangement, torch.arange(tokens))
            made[arrangement] = Rotation(cosine, sine, *arrangement.pairs(cosine.shape[1]))
        else:
            made[arrangement] = Rotation(
                *(torch.zeros(tokens, 0),) * 2, *(torch.zeros(0, dtype=torch.long),) * 2
            )
    return tuple(made[arrangement] for arrangement in arrangements)


def trial_places(window: int) -> Tensor:
    """Positions for `find`: the first ones, then further apart up to the end of the window, `[P]` int64."""
    most = max(1, min(window, 2**17) - 1)
    near = torch.arange(min(8, most + 1))
    far = torch.logspace(3, math.log2(most), _PLACES - 8, base=2).long().clamp(0, most)
    return torch.cat((near, far, torch.tensor([most]))).unique()


def find(model: Any, keys: Sequence[Tensor], places: Tensor) -> list[Arrangement | None]:
    """The arrangement of each layer, None where its keys are turned in a way that is not understood.

    `keys`: for each layer `[P, H, D]` of one token read alone at each of `places` `[P]`, the first of
    which is 0. A model without tables of rotations has its positions in the embeddings, or in none.
    """
    sources = list(_sources(model))
    out: list[Arrangement | None] = []
    for turned in keys:
        known = [a for a in dict.fromkeys(out) if a is not None and a.source]
        found = next(
            (a for a in (*known, *_candidates(model, sources, turned)) if _fits(model, a, turned, places)),
            None,
        )
        plain = _fits(model, Arrangement(), turned, places) or not sources
        out.append(Arrangement() if plain else found)
    return out


def _candidates(model: Any, sources: list[tuple[str, str]], keys: Tensor) -> Iterator[Arrangement]:
    size = keys.shape[-1]
    for source, layer_type in sources:
        try:
            pairs = _table(model, Arrangement(source, layer_type), torch.arange(1))[0].shape[1]
        except Exception:  # foreign code that was made to be called otherwise
            continue
        starts = dict.fromkeys((0, size - 2 * pairs)) if 2 * pairs <= size else ()
        layouts: tuple[Layout, ...] = ("halves", "neighbours")
        for backwards, layout, start in itertools.product((False, True), layouts, starts):
            yield Arrangement(source, layer_type, layout, start, backwards)


def _fits(model: Any, arrangement: Arrangement, keys: Tensor, places: Tensor) -> bool:
    plain = keys.double().transpose(0, 1)  # [H, P, D]
    if arrangement.source:
        cosine, sine = _table(model, arrangement, places)
        turn = Rotation(cosine, sine, *arrangement.pairs(cosine.shape[1]))
        plain = turn.off(plain, torch.arange(len(places)).expand(len(plain), -1))
    error = (plain - plain[:, :1]).abs().max()
    return bool(error <= _TOLERANCE[keys.dtype] * plain[:, :1].abs().max())


def _sources(model: Any) -> Iterator[tuple[str, str]]:
    """(name, layer type) of what gives a model's rotations: modules with frequencies, tables at the attention."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        table = getattr(module, _TABLE, None)
        if isinstance(table, Tensor) and table.ndim == 2 and not seen & {table.shape[1]}:
            seen.add(table.shape[1])
            yield f"{name}.{_TABLE}", ""
        buffers = [key for key, _ in module.named_buffers(recurse=False)]
        if not any("inv_freq" in key for key in buffers):
            continue
        if "layer_type" in inspect.signature(module.forward).parameters:
            kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
            yield from ((name, kind) for kind in dict.fromkeys(kinds))
        else:
            yield name, ""


@torch.inference_mode()
def _table(model: Any, arrangement: Arrangement, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[P, N]` float32 of each pair of channels at `places`, as the model computes them."""
    # The first positions come along: only where angles differ can it be seen how a table is laid out.
    asked = torch.cat((places, torch.arange(8))).to(model.device)
    parent, _, name = arrangement.source.rpartition(".")
    if name == _TABLE:
        sine, cosine = getattr(model.get_submodule(parent), name)[asked].float().cpu().chunk(2, -1)
    else:
        module = model.get_submodule(arrangement.source)
        like = torch.zeros(1, 1, 1, dtype=torch.float32, device=model.device)
        kind = {"layer_type": arrangement.layer_type} if arrangement.layer_type else {}
        found = module(like, asked[None], **kind)
        both = (found.real, found.imag) if isinstance(found, Tensor) else found
        cosine, sine = (part.reshape(len(asked), -1).float().cpu().clone() for part in both)
    columns = _one_a_pair(torch.cat((cosine, sine)))
    return cosine[: len(places), columns].contiguous(), sine[: len(places), columns].contiguous()


def _one_a_pair(table: Tensor) -> slice:
    """The columns with one entry a pair, of a table that may have an entry for both channels of each."""
    width = table.shape[1]
    if width % 2 == 0 and torch.equal(table[:, : width // 2], table[:, width // 2 :]):
        return slice(0, width // 2)
    if width % 2 == 0 and torch.equal(table[:, 0::2], table[:, 1::2]):
        return slice(0, width, 2)
    return slice(0, width)
