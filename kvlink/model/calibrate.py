"""What a model says of its own caches: its rotation, what it tolerates, and profiles made from texts.

Tolerance is read from what errors do: an error in a key changes logits by the queries that meet it,
an error in a value changes the layer's output by the projection behind it.

Does not know: codecs, messages. Place on the path: before it; both ends need the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvlink._release import RELEASE
from kvlink.errors import ContextError, UnsupportedCacheError
from kvlink.model.language import LanguageModel
from kvlink.model.prefill import attention_layers, prefill
from kvlink.model.restore import cache_shape
from kvlink.model.rotary import Rotation, rotations
from kvlink.profile import Profile, Side, make_side

KEY_STEP = 4.0
"""How much coarser keys are than logits: rounding to a step of 1 moves a logit by KEY_STEP / √12. Tuned on
the embedded model, where keys bear about four times the step of values."""

SINKS = 4
"""First positions that statistics leave out: models park attention there, and they are unlike others."""

_LEAST_SQUARE = 1e-4
"""Of the mean square of queries: a channel that seems to meet none is not thrown away, the weights may not tell all."""

_WHOLE_CHANNELS = 256
"""A basis spans all heads of a layer up to so many channels, else each head has its own."""


def rotation(lm: LanguageModel, tokens: int) -> tuple[Rotation, ...]:
    """The rotation of each layer at positions 0 … tokens − 1.

    Raises UnsupportedCacheError where the model's is not understood.
    """
    if not lm.traits.arrangements:
        raise UnsupportedCacheError(
            lm.traits.refused.get("transform", f"{lm.name}: its rotation is not known")
        )
    return rotations(lm.model, lm.traits.arrangements, tokens)


def units(lm: LanguageModel) -> tuple[tuple[Tensor, Tensor], ...]:
    """Steps that keys and values of each layer tolerate in a channel, `[C]` float64, from the weights.

    Keys: KEY_STEP ÷ the expected size of the queries on the channel's rotary pair. Values: 1 ÷ the
    norm of the output projection's column. Where a model's projections are not found, all ones.
    """
    shape = _Shape.of(lm)
    out = []
    for index, module in enumerate(_modules(lm)):
        queries = _query_sizes(lm, module, index, shape)
        columns = _output_metric(module, shape).diagonal(dim1=-2, dim2=-1).sqrt().reshape(-1)
        keys = KEY_STEP / (queries.reshape(-1) * shape.logit_scale(module)).clamp(min=1e-9)
        out.append((keys, 1 / columns.clamp(min=1e-9)))
    return tuple(out)


def _modules(lm: LanguageModel) -> list[Any]:
    """The attention module of each layer of the cache, None where they cannot be told apart."""
    found, layers = attention_layers(lm.model), cache_shape(lm, 1).layers
    return list(found) if [m.layer_idx for m in found] == list(range(layers)) else [None] * layers


@dataclass(frozen=True, slots=True)
class _Shape:
    """Heads and sizes of a model: Hq, Hkv, D."""

    heads: int
    kv_heads: int
    size: int

    @classmethod
    def of(cls, lm: LanguageModel) -> _Shape:
        known = cache_shape(lm, 1)
        told = getattr(lm.model.config.get_text_config(decoder=True), "num_attention_heads", None)
        heads = told if isinstance(told, int) and told % known.kv_heads == 0 else known.kv_heads
        return cls(heads, known.kv_heads, known.head_size)

    def logit_scale(self, module: Any) -> float:
        """√D times the layer's own scaling of logits: 1 for nearly all models."""
        scaling = getattr(module, "scaling", None)
        return (float(scaling) if isinstance(scaling, float) else self.size**-0.5) * self.size**0.5


def _query_sizes(lm: LanguageModel, module: Any, index: int, shape: _Shape) -> Tensor:
    """Expected root mean square of the queries by channel, `[Hkv, D]` float64, equal on rotary pairs."""
    rows = _query_rows(lm, module, shape)
    if rows is None:
        return torch.ones(shape.kv_heads, shape.size, dtype=torch.float64)
    square = rows.reshape(shape.kv_heads, -1, shape.size).square().mean(1)
    square = square.clamp(min=_LEAST_SQUARE * float(square.mean()))
    if lm.traits.arrangements:  # a rotation mixes the two channels of a pair
        (turn,) = rotations(lm.model, lm.traits.arrangements[index : index + 1], 1)
        mean = (square[:, turn.first] + square[:, turn.second]) / 2
        square[:, turn.first] = square[:, turn.second] = mean
    return square.sqrt()


def _query_rows(lm: LanguageModel, module: Any, shape: _Shape) -> Tensor | None:
    """Expected size of each query channel, `[Hq, D]` float64: a norm's weight, or the projection's rows."""
    norm = getattr(module, "q_norm", None)
    if norm is not None:
        wide = (_gain(norm, size) for size in (shape.size, shape.heads * shape.size))
        gain = next((found for found in wide if found is not None), None)
        return None if gain is None else gain.reshape(-1, shape.size).expand(shape.heads, shape.size)
    weight = _query_weight(module, shape)
    if weight is None:
        return None
    square = (weight * _input_gain(lm, module, weight.shape[1])).square().sum(1)
    bias = getattr(getattr(module, "q_proj", None), "bias", None)
    square = square if bias is None else square + _plain(bias).square()
    return square.sqrt().reshape(shape.heads, shape.size)


def _query_weight(module: Any, shape: _Shape) -> Tensor | None:
    """Rows of the query projection, `[Hq · D, hidden]` float64; None where it is not found."""
    rows = shape.heads * shape.size
    if (own := _matrix(module, "q_proj")) is not None:
        return own if len(own) == rows else None
    if (fused := _matrix(module, "qkv_proj")) is not None:
        return fused[:rows] if len(fused) == rows + 2 * shape.kv_heads * shape.size else None
    if (whole := _matrix(module, "query_key_value")) is not None and len(whole) == 3 * rows:
        return whole.reshape(shape.heads, 3, shape.size, -1)[:, 0].reshape(rows, -1)
    return None


def _matrix(module: Any, name: str) -> Tensor | None:
    weight = getattr(getattr(module, name, None), "weight", None)
    return _plain(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _input_gain(lm: LanguageModel, module: Any, hidden: int) -> Tensor:
    """Gain of the normalization before the layer's attention, `[hidden]` float64."""
    for parent in lm.model.modules():
        if module in parent.children() and getattr(parent, "input_layernorm", None) is not None:
            gain = _gain(parent.input_layernorm, hidden)
            if gain is not None:
                return gain
    return torch.ones(hidden, dtype=torch.float64)


def _gain(norm: Any, size: int) -> Tensor | None:
    """What a norm makes of each of `size` channels of size 1, `[size]` float64; None where it is no norm of so many.

    Tried on balanced signs: classes differ in whether a weight is a factor, one added to 1, or not there.
    """
    signs = torch.ones(size).reshape(-1, 2) if size % 2 == 0 else torch.ones(1, size)
    signs[:, -1] = -1
    weight = next(iter(norm.parameters()), None)
    like = signs.reshape(1, 1, size) if weight is None else signs.reshape(1, 1, size).to(weight)
    try:
        with torch.inference_mode():
            found = _plain(norm(like)).reshape(-1).abs()
    except Exception:  # another module that bears the name: it may want anything
        return None
    return found if found.numel() == size and bool(found.isfinite().all()) else None


def _output_metric(module: Any, shape: _Shape) -> Tensor:
    """`[Hkv, D, D]` float64: what an error in a value does to the output, summed over the group."""
    weight = _matrix(module, "o_proj")
    weight = _matrix(module, "dense") if weight is None else weight
    if weight is None or weight.shape[1] != shape.heads * shape.size:
        return torch.eye(shape.size, dtype=torch.float64).expand(shape.kv_heads, -1, -1)
    columns = weight.reshape(-1, shape.kv_heads, shape.heads // shape.kv_heads, shape.size)
    return torch.einsum("ohgc,ohgd->hcd", columns, columns)


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


@dataclass(slots=True)
class _Sums:
    """Running first and second moments of rows `[N, C]`."""

    count: int = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(0))
    second: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        if not self.count:
            self.first = torch.zeros(rows.shape[1], dtype=torch.float64)
            self.second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    @property
    def covariance(self) -> Tensor:
        return self.second / self.count - torch.outer(self.mean, self.mean)


def build_profile(lm: LanguageModel, texts: Sequence[str], on_text: Callable[[], object]) -> Profile:
    """A profile from the caches of `texts`, the same for the same texts and model.

    Raises ContextError without texts.
    """
    if not texts:
        raise ContextError("a profile needs texts to be made from, got none")
    shape = _Shape.of(lm)
    layers = _modules(lm)
    sums = [(_Sums(), _Sums()) for _ in layers]
    tokens = 0
    for text in texts:
        cache = prefill(lm, lm.context_ids(text))
        turns = rotation(lm, cache.tokens)
        tokens += cache.tokens
        for index, layer in enumerate(cache.layers):
            keys = turns[index].off(layer.keys.cpu().double(), layer.positions)
            for which, tensor in ((0, keys), (1, layer.values)):
                sums[index][which].add(tensor[:, SINKS:].transpose(0, 1).flatten(1).cpu())
        on_text()
    all_keys, all_values = [], []
    for index, (module, (of_keys, of_values)) in enumerate(zip(layers, sums, strict=True)):
        tolerance = torch.diag_embed(
            _query_sizes(lm, module, index, shape) * shape.logit_scale(module) / KEY_STEP
        )
        all_keys.append(_fit(of_keys, tolerance))
        metric = _root(_output_metric(module, shape))
        whole = torch.block_diag(*metric) @ of_values.covariance @ torch.block_diag(*metric)
        scale = whole.diagonal().mean().sqrt().clamp(min=1e-9)
        all_values.append(_fit(of_values, metric / scale))
    about = {"texts": str(len(texts)), "tokens": str(tokens), "model": lm.name, "release": RELEASE}
    return Profile(lm.fingerprint, tuple(all_keys), tuple(all_values), about)


def _fit(sums: _Sums, tolerance: Tensor) -> Side:
    """The Karhunen–Loève basis of rows measured in `tolerance` `[H, D, D]`: units of the step."""
    channels = sums.first.numel()
    blocks = 1 if channels <= _WHOLE_CHANNELS else len(tolerance)
    size, per = channels // blocks, len(tolerance) // blocks
    bases, spreads = [], []
    for block in range(blocks):
        metric = torch.block_diag(*tolerance[block * per : (block + 1) * per])
        part = slice(block * size, (block + 1) * size)
        covariance = sums.covariance[part, part]
        vectors = torch.linalg.eigh(metric @ covariance @ metric.T).eigenvectors
        # The signs of eigenvectors are free: the largest entry of each is made positive.
        vectors = vectors * vectors[vectors.abs().argmax(0), torch.arange(size)].sign()
        synthesis = (torch.linalg.solve(metric, vectors)).to(torch.float16).float()
        analysis = torch.linalg.inv(synthesis.double())
        bases.append(synthesis)
        spreads.append((analysis @ covariance @ analysis.T).diagonal().clamp(min=0).sqrt())
    return make_side(sums.mean, bases, torch.cat(spreads))


def _root(metric: Tensor) -> Tensor:
    """Symmetric square roots of `[H, D, D]`, kept away from singular."""
    values, vectors = torch.linalg.eigh(metric)
    values = torch.maximum(values, 1e-6 * values.amax(-1, keepdim=True))
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
