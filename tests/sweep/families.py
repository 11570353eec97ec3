"""Small random models of every family that transformers has for text generation."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 3072
MOST_PARAMETERS = 20_000_000
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "sliding_window": 32, "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 96, "d_model": 64, "n_layers": 4,
    "n_heads": 4, "ffn_dim": 96, "num_layers": 4, "num_heads": 4, "word_embed_proj_dim": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2, "decoder_layers": 4,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "attention_heads": 4, "max_seq_len": 512, "seq_length": 512,
}  # fmt: skip
_LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
_MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "falcon (ALiBi)": {"alibi": True, "multi_query": False},
    "falcon (grouped)": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "llama (YaRN)": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "llama (dynamic NTK)": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "gpt_neox (partial)": {"rotary_pct": 0.25},
    "qwen2 (no window)": {"sliding_window": None, "use_sliding_window": False},
    "mistral (no window)": {"sliding_window": None},
    **{name: {"num_key_value_heads": 4} for name in _LATENT},
}
"""What a family needs beside the sizes, and variants: `model type (variant)`."""

SMALL = (
    "llama", "gemma3_text", "vaultgemma", "olmo2", "glm4", "cohere", "gptj", "falcon", "falcon (ALiBi)",
    "falcon (grouped)", "bloom", "mpt", "opt", "gpt_bigcode", "nanochat", "gpt_oss", "smollm3", "deepseek_v3",
    "bert", "mamba",
)  # fmt: skip
"""Families that the tests run: each for a trait of its own."""


def names() -> list[str]:
    """Every family and variant."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in _MORE if " (" in name)})


def make(name: str, seed: int = 0) -> Any | None:
    """A small random model; None where the family cannot be made that small.

    Weights are doubled: at the stock scale attention is nearly flat and hides mistakes.
    """
    try:
        config = _config(name)
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in planned.parameters()) > MOST_PARAMETERS:
            return None
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    except Exception:  # configurations say in a hundred ways that sizes do not fit together
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.float()


def _config(name: str) -> Any:
    kind = CONFIG_MAPPING[name.partition(" (")[0]]
    known = _parameters(kind)
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    return kind(**{**sizes, **_MORE.get(name, {})})


@functools.cache
def _parameters(kind: Any) -> set[str]:
    annotated = [set(getattr(base, "__annotations__", {})) for base in kind.__mro__]
    return set(inspect.signature(kind.__init__).parameters).union(
        getattr(kind, "attribute_map", {}), *annotated
    )
