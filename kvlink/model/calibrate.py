"""What a model says of its own caches: its rotation, what it tolerates, and profiles made from texts.

Tolerance is read from what errors do: an error in a key changes logits by the queries that meet it,
an error in a value changes the layer's output by the projection behind it.

Does not know: codecs, messages. Place on the path: before it; both ends need the rotation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvlink._release import RELEASE
from kvlink.errors import ContextError, UnsupportedCacheError
from kvlink.model.loading import LanguageModel
from kvlink.model.prefill import attention_layers, prefill
from kvlink.model.restore import cache_shape
from kvlink.profile import Profile, Side, make_side

KEY_STEP = 4.0
"""How much coarser keys are than logits: rounding to a step of 1 moves a logit by KEY_STEP / √12. Tuned on
the embedded model, where keys bear about four times the step of values."""

SINKS = 4
"""First positions that statistics leave out: models park attention there, and they are unlike others."""

_WHOLE_CHANNELS = 256
"""A basis spans all heads of a layer up to so many channels, else each head has its own."""


def rotation(lm: LanguageModel, tokens: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Cosine and sine `[T, Drot]` float32 of each layer's rotary embedding, as the model computes them.

    Raises UnsupportedCacheError where the model has none that is understood.
    """
    module = getattr(lm.model.base_model, "rotary_emb", None)
    if module is None:
        raise UnsupportedCacheError(f"{lm.name}: no rotary embedding is found, so keys cannot be unrotated")
    config = lm.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    by_kind = "layer_type" in inspect.signature(module.forward).parameters
    places = torch.arange(tokens, device=lm.model.device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=lm.model.device)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        for kind in dict.fromkeys(kinds):
            cosine, sine = module(like, places, layer_type=kind) if by_kind else module(like, places)
            found[kind] = (cosine[0].float().cpu().clone(), sine[0].float().cpu().clone())
    return tuple(found[kind] for kind in kinds)


def units(lm: LanguageModel) -> tuple[tuple[Tensor, Tensor], ...]:
    """Steps that keys and values of each layer tolerate in a channel, `[C]` float64, from the weights.

    Keys: KEY_STEP ÷ the expected size of the queries on the channel's rotary pair. Values: 1 ÷ the
    norm of the output projection's column. Where a model's projections are not found, all ones.
    """
    layers = attention_layers(lm.model)
    shape = _Shape.of(lm)
    out = []
    for module in layers:
        queries = _query_sizes(lm, module, shape)
        columns = _output_metric(module, shape).diagonal(dim1=-2, dim2=-1).sqrt().reshape(-1)
        keys = KEY_STEP / (queries.reshape(-1) * shape.logit_scale(module)).clamp(min=1e-9)
        out.append((keys, 1 / columns.clamp(min=1e-9)))
    return tuple(out)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Heads and sizes of a model: Hq, Hkv, D."""

    heads: int
    kv_heads: int
    size: int

    @classmethod
    def of(cls, lm: LanguageModel) -> _Shape:
        known = cache_shape(lm, 1)
        heads = lm.model.config.get_text_config(decoder=True).num_attention_heads
        return cls(heads, known.kv_heads, known.head_size)

    def logit_scale(self, module: Any) -> float:
        """√D times the layer's own scaling of logits: 1 for nearly all models."""
        return float(getattr(module, "scaling", self.size**-0.5)) * self.size**0.5


def _query_sizes(lm: LanguageModel, module: Any, shape: _Shape) -> Tensor:
    """Expected root mean square of the queries by channel, `[Hkv, D]` float64, equal on rotary pairs."""
    if getattr(module, "q_norm", None) is not None:
        rows = _norm_weight(module.q_norm).expand(shape.heads, shape.size)
    else:
        weight = _query_weight(module, shape)
        if weight is None:
            return torch.ones(shape.kv_heads, shape.size, dtype=torch.float64)
        gain = _input_gain(lm, module, weight.shape[1])
        bias = getattr(getattr(module, "q_proj", None), "bias", None)
        square = (weight * gain).square().sum(1)
        square = square if bias is None else square + _plain(bias).square()
        rows = square.sqrt().reshape(shape.heads, shape.size)
    return _paired(rows.reshape(shape.kv_heads, -1, shape.size).square().mean(1)).sqrt()


def _paired(square: Tensor) -> Tensor:
    """Mean over the two channels of a rotary pair (c and c + D/2): a rotation mixes them."""
    first, second = square.chunk(2, -1)
    pair = (first + second) / 2
    return torch.cat((pair, pair), -1)


def _query_weight(module: Any, shape: _Shape) -> Tensor | None:
    """Rows of the query projection, `[Hq · D, hidden]` float64; None where it is not found."""
    rows = shape.heads * shape.size
    if hasattr(module, "q_proj"):
        return _plain(module.q_proj.weight)
    if hasattr(module, "qkv_proj"):
        return _plain(module.qkv_proj.weight)[:rows]
    if hasattr(module, "query_key_value"):
        whole = _plain(module.query_key_value.weight)
        return whole.reshape(shape.heads, 3, shape.size, -1)[:, 0].reshape(rows, -1)
    return None


def _input_gain(lm: LanguageModel, module: Any, hidden: int) -> Tensor:
    """Gain of the normalization before the layer's attention, `[hidden]` float64."""
    for parent in lm.model.modules():
        if module in parent.children() and getattr(parent, "input_layernorm", None) is not None:
            return _norm_weight(parent.input_layernorm)
    return torch.ones(hidden, dtype=torch.float64)


def _norm_weight(norm: Any) -> Tensor:
    weight = _plain(norm.weight)
    return weight + 1 if type(norm).__name__.startswith("Gemma") else weight


def _output_metric(module: Any, shape: _Shape) -> Tensor:
    """`[Hkv, D, D]` float64: what an error in a value does to the output, summed over the group."""
    projection = getattr(module, "o_proj", None) or getattr(module, "dense", None)
    if projection is None:
        return torch.eye(shape.size, dtype=torch.float64).expand(shape.kv_heads, -1, -1)
    columns = _plain(projection.weight).reshape(-1, shape.kv_heads, shape.heads // shape.kv_heads, shape.size)
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


def build_profile(
    lm: LanguageModel, texts: Sequence[str], unrotate: Callable[..., Tensor], on_text: Callable[[], object]
) -> Profile:
    """A profile from the caches of `texts`, the same for the same texts and model.

    `unrotate`: the codec's own way to take a rotation off. Raises ContextError without texts.
    """
    if not texts:
        raise ContextError("a profile needs texts to be made from, got none")
    shape = _Shape.of(lm)
    layers = attention_layers(lm.model)
    sums = [(_Sums(), _Sums()) for _ in layers]
    tokens = 0
    for text in texts:
        cache = prefill(lm, lm.context_ids(text))
        turns = rotation(lm, cache.tokens)
        tokens += cache.tokens
        for index, layer in enumerate(cache.layers):
            keys = unrotate(layer.keys.cpu().double(), layer.positions, turns[index])
            for which, tensor in ((0, keys), (1, layer.values)):
                sums[index][which].add(tensor[:, SINKS:].transpose(0, 1).flatten(1).cpu())
        on_text()
    all_keys, all_values = [], []
    for module, (of_keys, of_values) in zip(layers, sums, strict=True):
        tolerance = torch.diag_embed(_query_sizes(lm, module, shape) * shape.logit_scale(module) / KEY_STEP)
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
