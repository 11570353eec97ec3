"""The behavioural probe: a fixed text is read, and a short sketch of its cache is compared by both ends.

A fingerprint compares what is listed; the probe compares what the model does. `TOKENS` token ids, the same for
every model of a vocabulary, are read once in float32, and `sketch_of` keeps a few numbers of some layers, the
last one among them: for keys and for values the size of the tensor, and projections of groups of tokens on
fixed random signs. Two caches that differ by a share of their size differ by about that share here
(`kvlink.sketch`). Weights in a shorter dtype are widened a layer at a time, so that arithmetic in bfloat16
does not hide what a configuration changes.

Does not know: peers, texts, tokenizers. Place on the path: before it, at load.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from blake3 import blake3
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvlink.errors import KvlinkError, ModelError
from kvlink.model.fingerprint import stamp
from kvlink.model.forward import forward
from kvlink.model.remembered import recall, remember
from kvlink.payload import Fingerprint
from kvlink.sketch import GROUPS, STEPS, Sketch, chosen_layers

TOKENS = 64
"""Tokens that are read, fewer where the model's window is smaller."""
_SEED = b"kvlink probe 1"
_SMALLEST = 2.0**-100
_WIDENED = (torch.bfloat16, torch.float16)


def sketch_of(model: Any) -> Sketch:
    """The sketch of a loaded model. Raises ModelError where it cannot read the fixed text."""
    layers = read(model).layers
    sides = [side for i in chosen_layers(len(layers)) for side in (layers[i].keys, layers[i].values)]
    return Sketch(len(layers), tuple(number for side in sides for number in _numbers(side[0].float().cpu())))


def remembered_sketch(model: Any, fingerprint: Fingerprint, files: list[Any] | None) -> Sketch:
    """The same, remembered under the fingerprint, the files and whatever computes from them.

    `files`: as in `fingerprint_of`. A model that came from nowhere is read each time: what was changed in
    it beside its weights is in no fingerprint.
    """
    if not files:
        return sketch_of(model)
    code = inspect.getsourcefile(type(model))
    key = [
        _SEED.decode(), asdict(fingerprint), files, stamp(Path(code).parent) if code else None, str(model.dtype),
        str(model.device), model.config._attn_implementation, transformers.__version__, torch.__version__,
    ]  # fmt: skip
    known = recall("sketch", key)
    if isinstance(known, list) and len(known) == 2:
        with contextlib.suppress(KvlinkError, TypeError, ValueError):
            return Sketch(int(known[0]), tuple(int(number) for number in known[1]))
    made = sketch_of(model)
    remember("sketch", key, [made.layers, made.numbers])
    return made


def probe_ids(model: Any) -> list[int]:
    """Token ids of the fixed text: they follow from the size of the vocabulary alone."""
    config = model.config.get_text_config(decoder=True)
    rows = min(config.vocab_size, model.get_input_embeddings().weight.shape[0])
    stream = np.frombuffer(blake3(_SEED).digest(length=8 * TOKENS), "<u8")
    window = getattr(config, "max_position_embeddings", None) or TOKENS
    return [int(value) % rows for value in stream[: min(TOKENS, window)]]


@torch.inference_mode()
def read(model: Any) -> Any:
    """The cache that a model makes of the fixed text, in float32. Raises ModelError where it cannot read it."""
    ids = probe_ids(model)
    cache = DynamicCache(config=model.config)
    try:
        with in_float32(model):
            mask = torch.ones(len(ids), dtype=torch.long)
            forward(model, ids, cache, torch.arange(len(ids)), mask, last_only=True)
    except Exception as error:  # a model's code is foreign and raises anything
        raise ModelError(f"{model.config.model_type}: cannot read {len(ids)} tokens: {error!r}") from error
    return cache


def _numbers(side: Tensor) -> Iterator[int]:
    """Of keys or values `[H, S, D]`: log2 of their size, then `GROUPS` projections relative to it, in `1/STEPS`."""
    side = torch.nan_to_num(side.double(), 0.0, 0.0, 0.0)
    size = max(side.norm().item(), _SMALLEST)
    yield round(STEPS * math.log2(size))
    signs = _signs(side.numel()).view_as(side)
    for group in range(GROUPS):
        share = (side[:, group::GROUPS] * signs[:, group::GROUPS]).sum().item() / size
        yield round(STEPS * math.sqrt(GROUPS) * share)


def _signs(count: int) -> Tensor:
    """`count` fixed random signs."""
    bits = np.unpackbits(np.frombuffer(blake3(_SEED).digest(length=-(-count // 8)), np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The model computes in float32 meanwhile: each layer's weights are widened around its own forward pass."""
    kept: dict[Any, Tensor] = {}
    precision = torch.get_float32_matmul_precision()

    def widen(module: Any, recurse: bool = True) -> None:
        for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
            if tensor.dtype in _WIDENED and tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(module: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor in kept:
                tensor.data = kept.pop(tensor)

    handles = []
    for module, alone in _units(model):
        if alone:
            handles.append(module.register_forward_pre_hook(lambda m, _: widen(m)))
            handles.append(module.register_forward_hook(lambda m, *_: restore(m)))
        else:
            widen(module, False)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for handle in handles:
            handle.remove()
        restore(model)


def _units(module: Any) -> Iterator[tuple[Any, bool]]:
    """The parts of a model that are widened one at a time (True), and those around them, which hold few weights."""
    if isinstance(module, torch.nn.ModuleList):
        yield from ((inner, True) for inner in module)
    elif any(isinstance(inner, torch.nn.ModuleList) for inner in module.modules()):
        yield module, False
        for child in module.children():
            yield from _units(child)
    else:
        yield module, True
