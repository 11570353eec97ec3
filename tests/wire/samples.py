"""Transfers for wire tests: real codec output over caches of chosen shapes, no model."""

from __future__ import annotations

import torch

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.compress.codec import SegmentPlan, encode
from kvlink.compress.lossless import pack_part
from kvlink.payload import Fingerprint, Prompt, Segment
from kvlink.recipe import Recipe
from kvlink.wire.messages import Manifest
from kvlink.wire.session import SendSession

FINGERPRINT = Fingerprint(*(bytes([i]) * 16 for i in range(1, 6)))
TEXT = "Mira Voss was born in Tavik. " * 20


def make_cache(
    layers: int = 2, heads: int = 2, tokens: int = 24, size: int = 8, seed: int = 0, dtype=torch.bfloat16
) -> KVCache:
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> torch.Tensor:
        return torch.randn((heads, tokens, size), generator=generator).to(dtype)

    return KVCache(
        tuple(LayerCache(tensor(), tensor(), full_positions(heads, tokens)) for _ in range(layers)), tokens
    )


def make_transfer(
    recipe: str = "int4", kept: tuple[int, ...] | None = None, chunk_bytes: int = 300, **shape: int
):
    """(manifest, frames, kept cache) of one transfer."""
    parsed = Recipe.parse(recipe)
    cache = make_cache(**shape)
    chosen = cache if kept is None else cache.select(torch.tensor(kept))
    manifest = Manifest(
        transfer_id=b"t" * 16,
        fingerprint=FINGERPRINT,
        shape=cache.shape,
        recipe=parsed,
        prompt=Prompt("plain/1", b"Context: ", b"\n"),
        context_digest=b"c" * 16,
        text_bytes=len(TEXT.encode()) if parsed.mode == "text" else 0,
    )
    if parsed.mode == "text":
        segments = [Segment.of_text(pack_part("text", TEXT.encode(), "zstd"))]
    else:
        plans = [SegmentPlan.of(chosen, parsed.codec)]
        if parsed.background is not None:
            others = cache.others(torch.tensor(kept))
            plans.append(SegmentPlan.of(cache, parsed.background, others, rest=True))
        segments = [encode(plan, parsed.coder) for plan in plans]
    return manifest, list(SendSession(manifest, chunk_bytes).transfer(segments)), chosen
