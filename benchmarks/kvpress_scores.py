"""Compare the scores of real kvpress classes as they reach kvlink with what their own hook keeps.

kvpress needs an older transformers than kvlink's agents, so it has an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install "torch==2.13.0" "kvpress==0.5.5"
    kvpress-env/bin/pip install blake3 safetensors rich zstandard grpcio grpcio-status grpcio-health-checking protobuf
    PYTHONPATH=. kvpress-env/bin/python benchmarks/kvpress_scores.py

For each class: a random Qwen2 model prefills 200 tokens, once under the press itself, which cuts its cache to a
half, and once under kvlink with `press:NAME@0.5 scope=head sinks=0 recent=0`. The kept positions must be the
same, layer by layer and head by head. Prints a line a class; exits 1 where one differs.
"""

from __future__ import annotations

import sys

import kvpress
import torch
import transformers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from kvlink.compress.select import choose_positions
from kvlink.errors import ConfigError
from kvlink.model.loading import LanguageModel, embedded_folder, wrap
from kvlink.model.prefill import prefill, read_press
from kvlink.recipe import Recipe

TOKENS = 200
PRESSES = (
    "KnormPress",
    "KeyDiffPress",
    "SnapKVPress",
    "TOVAPress",
    "LagKVPress",
    "StreamingLLMPress",
    "ExpectedAttentionPress",
    "CURPress",
    "ObservedAttentionPress",
)


def random_model(attention: str) -> LanguageModel:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    config = Qwen2Config(
        vocab_size=3072, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # at the stock scale attention is nearly flat and hides mistakes
    return wrap("random", model, tokenizer)


@torch.inference_mode()
def kept_by_its_own_hook(lm: LanguageModel, ids: list[int], name: str) -> torch.Tensor:
    """Positions `[L, Hkv, K]` that the press keeps, found by the keys that survive."""
    full = prefill(lm, ids)
    cache = DynamicCache(config=lm.model.config)
    press = getattr(kvpress, name)(compression_ratio=0.5)
    with press(lm.model):
        lm.model(torch.tensor([ids]), past_key_values=cache)
    kept = []
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        distance = torch.cdist(layer.keys[0].float(), whole.keys.float())
        kept.append(distance.argmin(-1).sort(-1).values)
    return torch.stack(kept)


def main() -> int:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 3072, (TOKENS,), generator=generator).tolist()
    print(f"transformers {transformers.__version__}")
    bad = 0
    for name in PRESSES:
        lm = random_model("eager" if name == "ObservedAttentionPress" else "sdpa")
        recipe = Recipe.parse(f"press:{name}@0.5 raw scope=head sinks=0 recent=0")
        try:
            evidence = read_press(lm, ids, name, 0.5)
        except ConfigError as error:
            print(f"{name:24} refused: {error}")
            bad += 1
            continue
        ours = choose_positions(evidence, recipe.selection, prefill(lm, ids).shape)
        theirs = kept_by_its_own_hook(lm, ids, name)
        same = float((ours == theirs).float().mean()) if ours.shape == theirs.shape else 0.0
        print(f"{name:24} the same positions in {same:.1%} of {ours.numel()} places")
        bad += same < 1.0
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
