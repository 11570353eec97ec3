"""Shared fixtures: small random checkpoints of many architectures, saved and loaded by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlink.model.loading import LanguageModel, embedded_folder, load

# Shared machines stall; a deadline would fail on the machine, not on the code.
hypothesis.settings.register_profile("kvlink", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("kvlink")

VOCABULARY = 3072
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
_NEOX = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON),
    "mistral-sliding": ("MistralConfig", {**_COMMON, "sliding_window": 32}),
    "phi3": ("Phi3Config", _COMMON),
    "gemma": ("GemmaConfig", _COMMON),
    "gemma2-sliding": ("Gemma2Config", {**_COMMON, "sliding_window": 32}),
    "gemma3-sliding": (
        "Gemma3TextConfig",
        {**_COMMON, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gpt-neox": ("GPTNeoXConfig", {**_NEOX, "rotary_pct": 0.25}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Maker = Callable[..., Path]


def make_checkpoint(
    folder: Path, architecture: str, dtype: str = "float32", seed: int = 0, **shape: int
) -> Path:
    """A randomly initialised checkpoint in `folder`, with the embedded model's tokenizer.

    `shape`: values of the configuration instead of the small ones. Weights are doubled: at the stock
    scale attention is nearly flat and hides mistakes.
    """
    name, values = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**values, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.to(DTYPES[dtype]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`checkpoint(architecture, dtype, seed)`: the directory of such a model, made once."""
    made: dict[tuple[str, str, int], Path] = {}

    def get(architecture: str = "qwen2", dtype: str = "float32", seed: int = 0) -> Path:
        key = (architecture, dtype, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            made[key] = make_checkpoint(folder, architecture, dtype, seed)
        return made[key]

    return get


@pytest.fixture(scope="session")
def random_lm(checkpoint: Maker) -> Callable[..., LanguageModel]:
    """`random_lm(architecture, dtype, seed)`: the same, loaded from its directory, once."""
    loaded: dict[tuple[Any, ...], LanguageModel] = {}

    def get(architecture: str = "qwen2", dtype: str = "float32", seed: int = 0) -> LanguageModel:
        key = (architecture, dtype, seed)
        if key not in loaded:
            loaded[key] = load(str(checkpoint(*key)))
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    """The embedded model."""
    return load()


@pytest.fixture(autouse=True)
def _own_cache_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests remember fingerprints among themselves, not in the user's cache."""
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kvlink-cache"))


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (count,), generator=generator).tolist()
