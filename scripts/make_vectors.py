"""Write test vectors for protocol version 1: transfers, and what they decode to.

    python scripts/make_vectors.py

Vectors are kept for ever: run this only to add new ones. An existing file is never changed.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from blake3 import blake3

from kvlink.agent.builder import restored
from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.codecs import LowRank, Transform
from kvlink.compress.codec import SegmentPlan, encode
from kvlink.compress.codecs import CodecContext
from kvlink.compress.lossless import pack_part
from kvlink.model.rotary import Rotation
from kvlink.payload import Fingerprint, Prompt, Segment
from kvlink.recipe import Recipe
from kvlink.sketch import Sketch
from kvlink.wire.file import write_frames
from kvlink.wire.messages import Manifest
from kvlink.wire.session import SendSession, read_transfer

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "v1"
TEXT = "Tavik is a town."
VECTORS = {
    "text": ("text", None, "bfloat16"),
    "raw": ("raw", None, "bfloat16"),
    "lossless-float32": ("lossless/token", None, "float32"),
    "lossless": ("lossless", None, "bfloat16"),
    "int8": ("int8", None, "bfloat16"),
    "int4-kept": ("q2c@0.3 int4", (0, 1, 5, 9, 17), "bfloat16"),
    "int3-symmetric": ("int3/token/g8/sym coder=identity", None, "float16"),
    "int1": ("int1", None, "bfloat16"),
    "mixed": ("int2 layers=1:int8", None, "bfloat16"),
    "low-rank": ("int8 svd=3", None, "bfloat16"),
    "transform": ("transform=0.25 basis=own", None, "bfloat16"),
    "transform-kept": ("q2c@0.3 transform=0.5 basis=own", (0, 1, 5, 9, 17), "float16"),
    "sketch": ("int8", None, "bfloat16"),
    "transform-tiers": ("q2c@0.3 transform=0.25 rest=2 basis=own", (0, 1, 5, 9, 17), "bfloat16"),
}


def cache(dtype: str) -> KVCache:
    """Two layers, two heads, 18 tokens, head size 6; numbers from a formula, the same everywhere."""
    layers = []
    for layer in range(2):
        base = torch.arange(2 * 18 * 6, dtype=torch.float64).reshape(2, 18, 6)
        keys = torch.sin(base * 0.7 + layer) * 3 + 0.5
        values = torch.cos(base * 1.3 - layer)
        kind = getattr(torch, dtype)
        layers.append(LayerCache(keys.to(kind), values.to(kind), full_positions(2, 18)))
    return KVCache(tuple(layers), 18)


def known() -> CodecContext:
    """A rotation of two of the three channel pairs, and tolerances from a formula."""
    angle = torch.arange(18)[:, None] * torch.tensor([1.0, 0.1])[None]
    turns = Rotation(angle.cos(), angle.sin(), torch.tensor([0, 1]), torch.tensor([2, 3]))
    units = 0.5 + torch.arange(12, dtype=torch.float64) / 12
    return CodecContext((turns,) * 2, None, ((units, units),) * 2)


def transfer(recipe: Recipe, kept: tuple[int, ...] | None, dtype: str, sketched: bool) -> list[bytes]:
    full = cache(dtype)
    sketch = Sketch(2, tuple(range(-10_000, 10_000, 1000))) if sketched else None
    manifest = Manifest(
        transfer_id=bytes(range(16)),
        fingerprint=Fingerprint(*(bytes([i]) * 16 for i in range(1, 6))),
        shape=full.shape,
        recipe=recipe,
        prompt=Prompt("plain/1", b"Context: ", b"\n"),
        context_digest=bytes(16),
        text_bytes=len(TEXT) if recipe.mode == "text" else 0,
        sketch=sketch,
    )
    return list(SendSession(manifest, chunk_bytes=400).transfer(segments(full, recipe, kept)))


def segments(full: KVCache, recipe: Recipe, kept: tuple[int, ...] | None) -> list[Segment]:
    """The text, or the cache at `kept` and, with a background, the other positions behind."""
    if recipe.mode == "text":
        return [Segment.of_text(pack_part("text", TEXT.encode(), "zstd"))]
    if kept is None:
        return [encode(SegmentPlan.of(full, recipe.codec), recipe.coder, known())]
    positions = torch.tensor(kept)
    plans = [SegmentPlan.of(full, recipe.codec, positions)]
    if recipe.background is not None:
        plans.append(SegmentPlan.of(full, recipe.background, full.others(positions), rest=True))
    return [encode(plan, recipe.coder, known()) for plan in plans]


def digest(found: KVCache, recipe: Recipe) -> str | float:
    """BLAKE3 over the bytes of all keys, values and positions.

    Low rank and transform end in products, whose last bits are the machine's: there the sum of all
    numbers stands for them.
    """
    if isinstance(recipe.codec, LowRank | Transform):
        return float(sum(layer.keys.double().sum() + layer.values.double().sum() for layer in found.layers))
    total = blake3()
    for layer in found.layers:
        for tensor in (layer.keys, layer.values, layer.positions):
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest(length=16)


def expected(frames: list[bytes], recipe: Recipe) -> str | float:
    manifest, found = read_transfer(frames)
    return digest(restored(found, manifest.shape, lambda _: known()), recipe)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    index = FOLDER / "expected.json"
    told = json.loads(index.read_text()) if index.exists() else {}
    for name, (text, kept, dtype) in VECTORS.items():
        path = FOLDER / f"{name}.kvl"
        if path.exists():
            continue
        recipe = Recipe.parse(text)
        frames = transfer(recipe, kept, dtype, name == "sketch")
        out = io.BytesIO()
        write_frames(frames, out)
        path.write_bytes(out.getvalue())
        told[name] = TEXT if recipe.mode == "text" else expected(frames, recipe)
    index.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
