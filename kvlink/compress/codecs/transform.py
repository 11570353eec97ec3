"""The transform codec: keys without rotation and mean, coefficients in units of tolerance, one step.

    keys ─▶ rotation off ─▶ − mean ─▶ basis ─▶ ÷ step ─▶ round ─▶ entropy code

With a profile, mean, basis and spreads are known at both ends and only codes travel. Without one
the basis is the channels themselves, and their mean, step and spread travel with the message.
Arithmetic is float64, so that neither threads nor the cache's dtype change a byte.

Source: transform coding; rate and distortion as in Gersho and Gray, ch. 8; `docs/codec.md`.
Does not know: models, which positions were kept. Place on the path: quantize and code in one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvlink.codecs import Transform
from kvlink.compress.codecs import rans
from kvlink.compress.codecs.base import CodecContext, Place
from kvlink.compress.codecs.quantized import narrowed
from kvlink.errors import CodecError
from kvlink.payload import Part
from kvlink.profile import octave_codes
from kvlink.recipe import Coder


def encode(
    codec: Transform, tensor: Tensor, place: Place, coder: Coder, context: CodecContext
) -> tuple[int, tuple[Part, ...]]:
    """Bytes a scale (2 or 4) and the parts of keys or values `[H, K, D]`."""
    plain = tensor.detach().cpu().double()
    if not bool(plain.isfinite().all()):
        raise CodecError("a number is not finite: only raw and lossless carry it")
    if place.side == "keys":
        plain = context.rotation[place.layer].off(plain, place.positions)
    codes = _row_codes(codec, tensor.shape[1])
    shared = context.statistics(codec, place)
    if shared is not None:
        blocks = len(shared.synthesis)
        rows = _blocked(plain, blocks) - shared.mean.double().reshape(blocks, 1, -1)
        found = torch.einsum("bkc,bdc->bkd", rows, shared.analysis) / _from_code(codes)[None, :, None]
        return 2, (_codes(found, _classes(shared.spread, codes, found.shape)),)
    rows = _blocked(plain, tensor.shape[0])
    mean, width = _mean(rows)
    units = _channel_units(rows - mean, context.units[place.layer][place.side == "values"], place.side)
    found = (rows - mean) / _from_code(units).reshape(len(rows), 1, -1)
    spread = octave_codes(found.square().mean(1).sqrt().clamp(min=1e-9)).reshape(-1)
    header = mean.reshape(-1).to(torch.float16 if width == 2 else torch.float32).numpy().tobytes()
    header += units.to(torch.int8).numpy().tobytes() + spread.to(torch.int8).numpy().tobytes()
    found = found / _from_code(codes)[None, :, None]
    coded = _codes(found, _classes(spread, codes, found.shape))
    return width, (Part("scales", "identity", len(header), header), coded)


def decode(
    codec: Transform,
    parts: tuple[Part, ...],
    scale_bytes: int,
    place: Place,
    kind: torch.dtype,
    size: tuple[int, int, int],
    context: CodecContext,
) -> Tensor:
    """Keys or values of `size` `[H, K, D]` in `kind`. Raises CodecError where the parts do not fit."""
    heads, kept, channels = size
    codes = _row_codes(codec, kept)
    shared, steps = context.statistics(codec, place), _from_code(codes)[None, :, None]
    if shared is not None:
        shape = (len(shared.synthesis), kept, heads * channels // len(shared.synthesis))
        found = _symbols(parts[0], _classes(shared.spread, codes, shape), shape) * steps
        rows = torch.einsum("bkd,bcd->bkc", found, shared.synthesis.double())
        rows = rows + shared.mean.double().reshape(shape[0], 1, -1)
    else:
        mean, units, spread = _header(parts[0], scale_bytes, heads * channels)
        found = _symbols(parts[1], _classes(spread, codes, size), size) * steps
        rows = found * _from_code(units).reshape(heads, 1, channels) + mean.reshape(heads, 1, channels)
    plain = rows.transpose(0, 1).reshape(kept, heads, channels).transpose(0, 1)
    if place.side == "keys":
        plain = context.rotation[place.layer].on(plain, place.positions)
    return narrowed(plain, kind).contiguous()


def _row_codes(codec: Transform, rows: int) -> Tensor:
    """4 · log2 of the step of each row `[K]`."""
    return torch.full((rows,), codec.step_code)


def _blocked(tensor: Tensor, blocks: int) -> Tensor:
    """`[H, K, D]` → `[B, K, C/B]`: the channels of one block side by side."""
    heads, kept, size = tensor.shape
    return tensor.transpose(0, 1).reshape(kept, blocks, heads * size // blocks).transpose(0, 1)


def _mean(rows: Tensor) -> tuple[Tensor, int]:
    """Means `[B, 1, C/B]` as they travel, and their width: FP16 where that holds them."""
    mean = rows.mean(1, keepdim=True)
    narrow = mean.to(torch.float16).double()
    return (narrow, 2) if bool(narrow.isfinite().all()) else (mean.float().double(), 4)


def _channel_units(centred: Tensor, tolerated: Tensor, side: str) -> Tensor:
    """4 · log2 of the step that each channel tolerates, `[C]` int64. Values: relative to their size."""
    tolerated = tolerated.reshape(len(centred), 1, -1)
    if side == "values":
        tolerated = tolerated * (centred / tolerated).square().mean().sqrt().clamp(min=1e-9)
    return octave_codes(tolerated.reshape(-1))


def _from_code(codes: Tensor) -> Tensor:
    return torch.pow(torch.tensor(2.0, dtype=torch.float64), codes.double() / 4)


def _classes(spread: Tensor, codes: Tensor, shape: tuple[int, ...] | torch.Size) -> np.ndarray:
    """The class of every coefficient `[B · K · C/B]`: its channel's spread in steps of its row."""
    blocks, kept, channels = shape
    found = spread.reshape(blocks, 1, channels) - codes.reshape(1, kept, 1)
    return rans.clip_classes(found.reshape(-1).numpy())


def _codes(found: Tensor, classes: np.ndarray) -> Part:
    """The rounded coefficients, entropy coded. Plain are 4 bytes a coefficient."""
    if float(found.abs().max()) >= 2**31:
        raise CodecError(f"the step is too fine for a coefficient of {float(found.abs().max()):.3g} steps")
    data = rans.encode(found.round().reshape(-1).long().numpy(), classes)
    return Part("codes", "rans", 4 * classes.size, data)


def _symbols(part: Part, classes: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    if part.coder != "rans":
        raise CodecError(f"codes of a transform come in rans, found {part.coder}")
    return torch.from_numpy(rans.decode(part.data, classes)).double().reshape(shape)


def _header(part: Part, width: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[C]` float64, codes of units and of spreads `[C]` of a message without a profile."""
    mean = np.frombuffer(part.data, "<f2" if width == 2 else "<f4", channels)
    codes = np.frombuffer(part.data, np.int8, 2 * channels, width * channels).astype(np.int64)
    if not np.isfinite(mean).all():
        raise CodecError("a mean is not finite")
    units, spread = torch.from_numpy(codes).split(channels)
    return torch.from_numpy(mean.astype(np.float64)), units, spread
