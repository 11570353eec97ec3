"""`python benchmarks/packing.py [--tokens N] [RECIPE …]`: when a transfer's first bytes leave, and what memory it takes.

A cache of the shape of Qwen2.5-0.5B (24 layers, 2 KV heads of 64, bfloat16) with normal numbers, no model. For
each recipe, in a process of its own: the cache is made, a small transfer is packed to load what is loaded once,
then the whole one is packed to a file that keeps nothing. Printed, and as JSON with --json: bytes, seconds to
the first bytes of layer 0 and to the end, layers that were coded by then, and the peak of resident memory
beyond what stood before (`ru_maxrss`), beside the size of 4 layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

LAYERS, KV_HEADS, HEAD_SIZE = 24, 2, 64


def measure(recipe_text: str, tokens: int) -> dict[str, Any]:
    """One recipe, in this process."""
    import torch

    from kvlink.agent.transfer import Transfer, outlined
    from kvlink.cache import KVCache, LayerCache, full_positions
    from kvlink.compress.codec import SegmentPlan
    from kvlink.compress.codecs import CodecContext
    from kvlink.payload import Fingerprint, Prompt
    from kvlink.receipt import Receipt
    from kvlink.recipe import Recipe
    from kvlink.wire.messages import Manifest

    recipe, random = Recipe.parse(recipe_text), torch.Generator().manual_seed(42)

    def cache(count: int) -> KVCache:
        def side() -> torch.Tensor:
            return torch.randn(KV_HEADS, count, HEAD_SIZE, generator=random, dtype=torch.bfloat16)

        layers = [LayerCache(side(), side(), full_positions(KV_HEADS, count)) for _ in range(LAYERS)]
        return KVCache(tuple(layers), count)

    def transfer(held: KVCache) -> Transfer:
        plan = SegmentPlan.of(held, recipe.codec)
        manifest = Manifest(
            bytes(16),
            Fingerprint(*[bytes(16)] * 5),
            held.shape,
            recipe,
            Prompt("plain/1", b"", b""),
            bytes(16),
        )
        return Transfer(manifest, [outlined(plan, recipe.coder, lambda _: CodecContext())], Receipt())

    class Sink:
        """Keeps nothing but when the first bytes of a layer came."""

        def __init__(self) -> None:
            self.count = self.frames = 0
            self.first_s = 0.0

        def write(self, data: bytes, /) -> int:
            self.count += len(data)
            self.frames += 1
            if self.frames == 4:  # after the head, the manifest and the segment's header
                self.first_s = time.perf_counter() - began
            return len(data)

    began = time.perf_counter()
    transfer(cache(64)).write(Sink())
    held = cache(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, sink = time.perf_counter(), Sink()
    transfer(held).write(sink)
    total_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "recipe": recipe_text, "tokens": tokens, "cache_bytes": held.shape.cache_bytes,
        "four_layers_bytes": 4 * held.shape.cache_bytes // LAYERS, "wire_bytes": sink.count,
        "first_s": round(sink.first_s, 4), "total_s": round(total_s, 4), "peak_bytes": 1024 * (after - before),
    }  # fmt: skip


def in_a_process(recipe: str, tokens: int) -> dict[str, Any]:
    """`measure` in a process of its own, so that no other work is in its peak."""
    command = [sys.executable, __file__, "--one", "--tokens", str(tokens), recipe]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=["raw", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        print(json.dumps(measure(told.recipes[0], told.tokens)))
        return
    for recipe in told.recipes:
        row = in_a_process(recipe, told.tokens)
        if told.json:
            print(json.dumps(row))
        else:
            print(
                f"{recipe:8} {row['wire_bytes'] / 1e6:7.1f} MB of a cache of {row['cache_bytes'] / 1e6:.1f} MB   "
                f"first bytes after {row['first_s'] * 1e3:.0f} ms of {row['total_s'] * 1e3:.0f}   "
                f"peak {row['peak_bytes'] / 1e6:+.1f} MB, 4 layers are {row['four_layers_bytes'] / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
