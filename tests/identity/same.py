"""One model in other clothes, and models that are nearly one: how far apart sketches are in either case."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvlink.model import probe
from kvlink.model.loading import LanguageModel, load, wrap
from kvlink.model.probe import sketch_of
from kvlink.sketch import Sketch


def apart(one: Sketch, two: Sketch) -> float:
    """The largest difference anywhere, as a share of the size."""
    return max(difference.share for difference in one.differences(two))


def noise(one: LanguageModel, two: LanguageModel) -> float:
    """The largest difference of the caches that the sketches are made of, as a share of their size."""
    return max(
        ((x - y).norm() / x.norm()).item()
        for a, b in zip(probe.read(one.model).layers, probe.read(two.model).layers, strict=True)
        for x, y in ((a.keys, b.keys), (a.values, b.values))
    )


def clothes(folder: str, scratch: Path) -> Iterator[tuple[str, LanguageModel]]:
    """The model of a folder again: other threads, kernels, dtypes, layouts of its files. Each must be accepted."""
    lm = load(folder)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            yield f"{count} thread{'s' * (count > 1)}", wrap("threads", lm.model, lm.tokenizer)
        finally:
            torch.set_num_threads(threads)
    yield "eager attention", load(folder, attention="eager")
    yield "weights copied to float32, computed in float32", load(folder, dtype="float32")
    wide = load(folder, dtype="float32")
    wide.model.save_pretrained(scratch / "wide")
    wide.tokenizer.save_pretrained(scratch / "wide")
    yield "a copy of the files in float32", load(str(scratch / "wide"), dtype=lm.dtype)
    largest = max(tensor.nbytes for tensor in lm.model.state_dict().values())
    lm.model.save_pretrained(scratch / "shards", max_shard_size=max(300_000, largest + 1))
    lm.tokenizer.save_pretrained(scratch / "shards")
    count = len(list((scratch / "shards").glob("*.safetensors")))
    yield f"files in {count} shards", load(str(scratch / "shards"))
    untied = copy.deepcopy(lm.model)
    head = untied.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    yield "output embedding copied", wrap("untied", untied, lm.tokenizer)


def elsewhere(folder: str) -> Sketch:
    """The sketch that a process without AVX makes, whose sums run in another order."""
    code = "import sys; from kvlink.model.loading import load; s = load(sys.argv[1]).sketch; print(s.layers, *s.numbers)"
    slow = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    }
    with tempfile.TemporaryDirectory() as cache:
        made = subprocess.run(
            [sys.executable, "-c", code, folder], env={**os.environ, **slow, "KVLINK_CACHE_DIR": cache},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    layers, *numbers = map(int, made.stdout.split())
    return Sketch(layers, tuple(numbers))


def tuned(lm: LanguageModel) -> Iterator[tuple[str, Sketch]]:
    """Fine-tunes: all weights scattered by a share of themselves, and a change of rank one in one layer."""
    for share in (0.0001, 0.001, 0.01, 0.1):
        model, generator = copy.deepcopy(lm.model).float(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
        yield f"all weights scattered by {share:.2%}", sketch_of(model)
    for share in (0.01, 0.1):
        model, generator = copy.deepcopy(lm.model).float(), torch.Generator().manual_seed(1)
        layers = [p for name, p in model.named_parameters() if name.endswith("q_proj.weight")]
        weight = layers[len(layers) // 2]
        with torch.no_grad():
            a, b = (torch.randn(n, generator=generator) for n in weight.shape)
            update = torch.outer(a, b)
            weight.add_(update * (share * weight.norm() / update.norm()))
        yield f"rank one in the queries of one layer, {share:.0%} of its size", sketch_of(model)


def in_own_dtype(lm: LanguageModel, dtype: torch.dtype, attention: str) -> Sketch:
    """The sketch that the model would have if it were read in a shorter dtype: what the probe does not do."""
    model = copy.deepcopy(lm.model).to(dtype)
    model.set_attn_implementation(attention)
    kept, probe._WIDENED = probe._WIDENED, ()
    try:
        return sketch_of(model)
    finally:
        probe._WIDENED = kept
