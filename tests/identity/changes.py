"""Pairs of tiny models with the same weights, one field of whose configurations differs.

`CHANGES` alter the cache, `HARMLESS` do not; `caches_apart` is the oracle for both. Values are those of tiny
models: many fields alter a real model's cache more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from kvlink.model.fingerprint import fingerprint_of
from kvlink.model.loading import embedded_folder
from kvlink.model.probe import sketch_of
from kvlink.model.template import template_for
from kvlink.payload import Fingerprint
from kvlink.sketch import Sketch

SAME = 1e-3
"""Caches that differ by less, as a share of their size, are the same."""
_TOKENS = 160

_PLAIN: dict[str, Any] = {
    "vocab_size": 3072, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
_GPT2 = {"vocab_size": 3072, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "eos_token_id": 1}
_NEOX = {k: v for k, v in _PLAIN.items() if k not in ("num_key_value_heads", "head_dim")}
_SLIDING = {**_PLAIN, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
_THETA = {"rope_type": "default", "rope_theta": 10_000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _PLAIN),
    "Qwen2": ("Qwen2Config", {**_PLAIN, "use_sliding_window": True, "sliding_window": 32}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**_PLAIN, "num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    "Mixtral": ("MixtralConfig", {**_PLAIN, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "Mistral": ("MistralConfig", {**_PLAIN, "sliding_window": 32}),
    "SmolLM3": ("SmolLM3Config", {**_PLAIN, "no_rope_layers": [1, 1, 1, 1]}),
    "Granite": ("GraniteConfig", {**_PLAIN, "attention_multiplier": 0.25}),
    "OLMo": ("OlmoConfig", _PLAIN),
    "Nemotron": ("NemotronConfig", _PLAIN),
    "Gemma": ("GemmaConfig", _PLAIN),
    "Gemma 2": ("Gemma2Config", _SLIDING),
    "Gemma 3": ("Gemma3TextConfig", _SLIDING),
    "GPT-2": ("GPT2Config", _GPT2),
    "GPT-NeoX": ("GPTNeoXConfig", {**_NEOX, "rotary_pct": 0.25}),
    "Phi": ("PhiConfig", _NEOX),
    "StableLM": ("StableLmConfig", {**_NEOX, "num_key_value_heads": 2}),
    "OPT": ("OPTConfig", {**_NEOX, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Starcoder2": ("Starcoder2Config", {**_NEOX, "num_key_value_heads": 2}),
    "Cohere": ("CohereConfig", {**_NEOX, "num_key_value_heads": 2}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """`field` of a family's configuration has the value `one` at the first model, `two` at the second."""

    family: str
    field: str
    one: Any
    two: Any

    def __str__(self) -> str:
        return f"{self.family} {self.field} {_short(self.one)} → {_short(self.two)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(inner) for inner in value.values() if not isinstance(inner, dict)) or "nested"
    return (
        "".join(x[0] for x in value) if isinstance(value, list) and isinstance(value[0], str) else str(value)
    )


def _rope(**more: Any) -> dict[str, Any]:
    return {**_THETA, **more}


CHANGES = (
    Change("Llama", "rms_norm_eps", 1e-6, 0.1),
    Change("Llama", "rms_norm_eps", 1e-6, 1e-3),
    Change("Llama", "hidden_act", "silu", "gelu"),
    Change("Llama", "rope_parameters", _rope(), _rope(rope_theta=500_000.0)),
    Change("Llama", "rope_parameters", _rope(), _rope(rope_type="linear", factor=2.0)),
    Change(
        "Llama", "rope_parameters", _rope(),
        _rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64),
    ),
    Change(
        "Llama", "rope_parameters", _rope(),
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    Change("Qwen2", "layer_types", ["full_attention"] * 4, ["full_attention"] * 2 + ["sliding_attention"] * 2),
    Change("Qwen3-MoE", "num_experts_per_tok", 2, 4),
    Change("Qwen3-MoE", "norm_topk_prob", False, True),
    Change("Mixtral", "num_experts_per_tok", 1, 2),
    Change("Mistral", "sliding_window", 32, 16),
    Change("Mistral", "sliding_window", 100, 120),
    Change("SmolLM3", "no_rope_layers", [1, 1, 1, 1], [1, 0, 1, 0]),
    Change("SmolLM3", "no_rope_layers", [1, 1, 1, 1], [1, 1, 1, 0]),
    Change("Granite", "attention_multiplier", 0.25, 1.0),
    Change("Granite", "residual_multiplier", 1.0, 0.22),
    Change("Granite", "embedding_multiplier", 1.0, 12.0),
    Change("OLMo", "clip_qkv", None, 0.05),
    Change("Nemotron", "norm_eps", 1e-5, 0.5),
    Change("Nemotron", "hidden_act", "relu2", "relu"),
    Change("Gemma", "hidden_act", "gelu_pytorch_tanh", "relu"),
    Change("Gemma 2", "attn_logit_softcapping", 50.0, 1.0),
    Change("Gemma 2", "query_pre_attn_scalar", 256, 16),
    Change("Gemma 3", "sliding_window", 32, 24),
    Change("Gemma 3", "layer_types", _SLIDING["layer_types"], _SLIDING["layer_types"][::-1]),
    Change(
        "Gemma 3", "rope_parameters",
        {"sliding_attention": _THETA, "full_attention": _rope(rope_theta=1_000_000.0)},
        {"sliding_attention": _THETA, "full_attention": _THETA},
    ),
    Change("GPT-2", "scale_attn_weights", True, False),
    Change("GPT-2", "layer_norm_epsilon", 1e-5, 1e-2),
    Change("GPT-2", "activation_function", "gelu_new", "relu"),
    Change("GPT-NeoX", "use_parallel_residual", True, False),
    Change("GPT-NeoX", "rope_parameters", _rope(partial_rotary_factor=0.25), _rope(partial_rotary_factor=0.5)),
    Change("Phi", "rope_parameters", _rope(partial_rotary_factor=0.5), _rope(partial_rotary_factor=0.25)),
    Change("StableLM", "use_parallel_residual", False, True),
    Change("OPT", "activation_function", "relu", "gelu"),
    Change("Starcoder2", "norm_epsilon", 1e-5, 0.1),
    Change("Cohere", "layer_norm_eps", 1e-5, 0.1),
)  # fmt: skip
"""Fields that change what a cache holds."""

HARMLESS = (
    Change("Llama", "rope_scaling", {"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0}),
    Change("Gemma 3", "sliding_window_pattern", None, 6),
    Change("Llama", "initializer_range", 0.02, 0.5),
    Change("Llama", "use_cache", True, False),
    Change("Llama", "attention_dropout", 0.0, 0.1),
    Change("Llama", "max_position_embeddings", 512, 1024),
    Change("Llama", "pretraining_tp", 1, 2),
    Change("Llama", "bos_token_id", None, 3),
    Change("Llama", "eos_token_id", 1, [1, 7]),
    Change("Llama", "pad_token_id", 0, None),
    Change("Llama", "architectures", None, ["LlamaForCausalLM"]),
    Change("Llama", "transformers_version", "5.3.0", "4.40.0"),
    Change("Llama", "_name_or_path", "here", "there"),
    Change("Llama", "id2label", None, {0: "yes", 1: "no"}),
    Change("Llama", "task_specific_params", None, {"chat": {"temperature": 0.7}}),
    Change("Llama", "unsloth_fixed", None, True),
    Change("Llama", "pruned_heads", None, {}),
    Change("Llama", "add_cross_attention", None, False),
    Change("Llama", "is_decoder", None, False),
    Change("Llama", "torchscript", None, False),
    Change("Llama", "tf_legacy_loss", None, False),
    Change("Llama", "_attn_implementation_autoset", None, True),
    Change("Llama", "rope_parameters", _rope(rope_theta=10_000), _rope(rope_theta=10_000.0)),
    Change("Llama", "rms_norm_eps", 1e-5, 9.999999747378752e-06),
    Change("Qwen2", "max_window_layers", 28, 4),
    Change("Qwen3-MoE", "router_aux_loss_coef", 0.001, 0.1),
    Change("Qwen3-MoE", "output_router_logits", False, True),
    Change("Granite", "logits_scaling", 1.0, 8.0),
    Change("Gemma 2", "final_logit_softcapping", 30.0, 10.0),
    Change("GPT-2", "resid_pdrop", 0.1, 0.0),
    Change("GPT-2", "summary_type", "cls_index", "mean"),
    Change("Cohere", "logit_scale", 0.0625, 1.0),
)
"""Fields that do not."""


def build(family: str, field: str, value: Any) -> Any:
    """A tiny model, whose weights follow from the family alone. Twice the stock scale: attention is flat otherwise."""
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**values, field: copy.deepcopy(value)})
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, 0.1 if parameter.ndim > 1 else 0.3, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Known:
    """A model, and what is known of it to others."""

    model: Any
    fingerprint: Fingerprint
    sketch: Sketch


def pair(change: Change) -> tuple[Known, Known]:
    """The two models of a change. Their weights are the same."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    template = template_for(tokenizer)
    one, two = (build(change.family, change.field, value) for value in (change.one, change.two))
    a, b = (Known(m, fingerprint_of(m, tokenizer, template), sketch_of(m)) for m in (one, two))
    return a, b


@torch.inference_mode()
def caches_apart(one: Known, two: Known) -> float:
    """The largest difference of a layer's keys or values over a text, as a share of their size; inf for other shapes."""
    ids = torch.randint(5, 3000, (1, _TOKENS), generator=torch.Generator().manual_seed(7))
    caches = []
    for known in (one, two):
        cache: Any = DynamicCache(config=known.model.config)
        known.model(ids, past_key_values=cache, use_cache=True)
        caches.append(cache.layers)
    worst = 0.0
    for a, b in zip(*caches, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            if x.shape != y.shape:
                return float("inf")
            worst = max(worst, ((x - y).norm() / y.norm()).item())
    return worst
