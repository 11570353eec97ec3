"""Figures of docs/codec.md on the entropy coder: what it costs beside zstd, its speed, and its tables.

    python benchmarks/coder.py

Prints, for 400,000 rounded Gaussian numbers of several widths, their entropy and the bits that rANS and
zstd need; the speed of rANS; and, for the coefficients of 20 contexts of the embedded model at a step of 1,
the bits that tables of three distributions would need. Timings are of one thread; compare within one run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
import zstandard

from kvlink.agent.sender import Sender
from kvlink.compress.codecs import rans
from kvlink.eval.questions import generated
from kvlink.model.calibrate import rotation
from kvlink.profile import Profile

COUNT = 400_000
WIDTHS = (0.3, 0.6, 1.2, 2.5, 5.0)
SEED = 0
Distribution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def against_zstd() -> None:
    rng = np.random.default_rng(SEED)
    print("width  entropy    rANS    zstd   encode  decode   (bits a symbol; million symbols a second)")
    for width in WIDTHS:
        symbols = np.rint(rng.normal(0, width, COUNT)).astype(np.int64)
        counts = np.unique(symbols, return_counts=True)[1] / COUNT
        entropy = float(-(counts * np.log2(counts)).sum())
        classes = np.full(COUNT, round(4 * np.log2(width)))
        began = time.perf_counter()
        coded = rans.encode(symbols, classes)
        encoded = time.perf_counter()
        if not (rans.decode(coded, classes) == symbols).all():
            raise SystemExit("the coder lost a symbol")
        decoded = time.perf_counter()
        packed = min(
            len(zstandard.ZstdCompressor(level).compress((symbols + 64).astype(np.uint8).tobytes()))
            for level in (1, 3, 9)
        )
        print(
            f"{width:5.1f}  {entropy:7.3f} {8 * len(coded) / COUNT:7.3f} {8 * packed / COUNT:7.3f}  "
            f"{COUNT / (encoded - began) / 1e6:7.0f} {COUNT / (decoded - encoded) / 1e6:7.0f}"
        )


def logistic(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x / (spread * 3**0.5 / torch.pi))


def gaussian(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / spread / 2**0.5))


def laplacian(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    scale = spread / 2**0.5
    tail = 0.5 * torch.exp(-x.abs() / scale)
    return torch.where(x < 0, tail, 1 - tail)


def coefficients(sender: Sender, profile: Profile) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(symbols `[K, C]`, spread `[C]`) of every layer and side of 20 contexts, at a step of 1."""
    found = []
    for item in itertools.islice(generated(SEED), 20):
        cache = sender.read(item.context).cache
        turns = rotation(sender.lm, cache.tokens)
        for index, layer in enumerate(cache.layers):
            keys = turns[index].off(layer.keys.double(), layer.positions)
            for side, tensor in ((profile.keys[index], keys), (profile.values[index], layer.values.double())):
                rows = tensor.transpose(0, 1).flatten(1) - side.mean.double()
                spread = torch.pow(2.0, side.spread.double().clamp(rans.LOWEST, rans.HIGHEST) / 4)
                found.append(((rows @ side.analysis[0].T).round(), spread))
    return found


def tables() -> None:
    sender = Sender()
    if sender.lm.profile is None:
        raise SystemExit("the embedded model has no profile")
    found = coefficients(sender, sender.lm.profile)
    total = sum(symbols.numel() for symbols, _ in found)
    shapes: tuple[tuple[str, Distribution], ...] = (
        ("logistic", logistic), ("gaussian", gaussian), ("laplacian", laplacian),
    )  # fmt: skip
    print("\ntables of a step of 1, embedded model: bits a coefficient")
    for name, shape in shapes:
        bits = 0.0
        for symbols, spread in found:
            share = (shape(symbols + 0.5, spread) - shape(symbols - 0.5, spread)).clamp(min=2**-16)
            bits -= float(share.log2().sum())
        print(f"{name:10} {bits / total:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    against_zstd()
    with torch.inference_mode():
        tables()
