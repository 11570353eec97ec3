"""Fingerprints: who a model is, by components, independent of path, sharding and dtype of the files.

    weights       every tensor that was loaded: its name in the model, shape and values
    architecture  the whole configuration of the text model, less `HARMLESS`
    rotary        the fields of it that say how positions are rotated
    tokenizer     the tokenizer as it serializes itself
    template      the text of the chat template, its options, and how context and question are put

Weights are hashed where they are used, in memory: whatever a folder holds beside them (other formats,
shadowed files, an adapter), what was loaded is what counts, and a model that never was in a folder has the
digest that it would have there. Reading them all is slow, so `weights` of a folder is remembered under
every file in it (`stamp`). Templates and tokenizers count as they are, not as they render today.

Does not know: caches, peers. Place on the path: before it; compared before any byte moves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from kvlink.errors import ModelError
from kvlink.model.remembered import canonical, recall, remember
from kvlink.model.template import Template
from kvlink.payload import Fingerprint

HARMLESS: dict[str, str] = {
    "_attn_implementation_autoset": "which kernels",
    "_commit_hash": "where it was found",
    "transformers_version": "who wrote the file",
    "unsloth_fixed": "who wrote the file",
    "unsloth_version": "who wrote the file",
    "architectures": "which head the file was saved with; the class that was loaded shows in its tensors",
    "auto_map": "remote code, which never runs",
    "tokenizer_class": "the tokenizer is a component of its own",
    "dtype": "of a cache; compared apart",
    "torch_dtype": "of a cache; compared apart",
    "use_cache": "what a forward pass returns",
    "return_dict": "what a forward pass returns",
    "output_hidden_states": "what a forward pass returns",
    "output_attentions": "what a forward pass returns",
    "output_router_logits": "what a forward pass returns",
    "id2label": "classification",
    "label2id": "classification",
    "problem_type": "classification",
    "finetuning_task": "classification",
    "task_specific_params": "generation",
    "router_aux_loss_coef": "training",
    "gradient_checkpointing": "training",
    "tie_word_embeddings": "both ends of the tie are among the weights",
    "chunk_size_feed_forward": "the same product in pieces",
    "pretraining_tp": "the same product in pieces",
    "final_logit_softcapping": "after the cache, and keeps the order of tokens",
    "logits_scaling": "after the cache, and keeps the order of tokens",
    "logit_scale": "after the cache, and keeps the order of tokens",
    "max_window_layers": "decides `layer_types`, which counts",
    "_sliding_window_pattern": "decides `layer_types`, which counts",
    "sliding_window_pattern": "decides `layer_types`, which counts",
    "no_rope_layer_interval": "decides `no_rope_layers`, which counts",
    "max_position_embeddings": "how far, not how: a table is a weight; rotations that depend on it count",
}
"""Fields of a configuration that change no cache, with the reason. All others count, known or not."""
_OFF_IN_OLDER_RELEASES = (
    "pruned_heads", "tf_legacy_loss", "torchscript", "use_bfloat16", "add_cross_attention", "tie_encoder_decoder",
    "is_decoder",
)  # fmt: skip
"""Fields that older releases wrote into every configuration: where they are off they are as good as absent."""
HARMLESS_WORDS: dict[str, str] = {
    "name_or_path": "where it was found",
    "_token_id": "generation; kvlink never pads",
    "dropout": "training",
    "pdrop": "training",
    "layerdrop": "training",
    "initializer": "how training began",
    "init_std": "how training began",
    "summary_": "a head for another task",
}
"""Parts of names of such fields."""
_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta", "rotary", "partial_rotary_factor")
_ROPE_OF_ANY_WINDOW = ("default", "linear", "llama3")
"""Rotations that are the same whatever the model's window."""
_CUTS = ("The river bends twice.\n\n", " 12,345.67 – naïve façade 東京 🙂", "\tdef f(x):  return x", "")
_MAX_FILES = 1000
_COMPILED = "_orig_mod."
_FLOAT32_MOST = 3e38


def fingerprint_of(
    model: Any, tokenizer: Any, template: Template, files: list[Any] | None = None
) -> Fingerprint:
    """The fingerprint of a loaded model.

    `files`: the `stamp` of what it was loaded from, where nothing has changed it since; its weights'
    digest is then remembered. Raises ModelError where weights are not in memory.
    """
    fields = _configuration(model)
    rotary = {name: value for name, value in fields.items() if name.startswith(_ROTARY)}
    if any(kind not in _ROPE_OF_ANY_WINDOW for kind in _rope_kinds(rotary)):
        rotary["window"] = _text_config(model).get("max_position_embeddings")
    return Fingerprint(
        weights=_weights(model, files),
        architecture=_digest({name: value for name, value in fields.items() if name not in rotary}),
        rotary=_digest(rotary),
        tokenizer=_digest(_tokenizer(tokenizer)),
        template=_digest(_template(template)),
    )


def stamp(folder: Path | None) -> list[Any] | None:
    """Every file in a folder: path, size, times, inode, device. None where that is not all that decides.

    A folder with an adapter may take its base from elsewhere, and a huge one is not gone through.
    """
    found: list[Any] = []
    if folder is None:
        return None
    for at, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.join(at, name)
            if name == "adapter_config.json" or len(found) == _MAX_FILES:
                return None
            try:
                s = os.stat(path)
            except OSError:
                return None
            found.append(
                [os.path.realpath(path), name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]
            )
    return sorted(found)


def _digest(value: Any) -> bytes:
    return blake3(canonical(value).encode()).digest(length=16)


def _plain(value: Any) -> Any:
    """JSON values, equal ones alike: 1, 1.0 and True; floats as float32 has them, as some formats keep them.
    Fields without a value are left out."""
    if isinstance(value, dict):
        kept = {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
        if "rope_type" in kept:
            kept.pop("type", None)  # its older name
        return kept
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and abs(value) < _FLOAT32_MOST:
        value = torch.tensor(value, dtype=torch.float32).item()
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def _text_config(model: Any) -> dict[str, Any]:
    config = model.config
    text = config.get_text_config(decoder=True).to_dict()
    whole = config.to_dict()
    return {
        **text,
        "quantization_config": text.get("quantization_config") or whole.get("quantization_config"),
    }


def _configuration(model: Any) -> dict[str, Any]:
    """What counts of a model's configuration, defaults filled in, with the adapters that are on it.

    What files of different releases write differently is written alike.
    """
    fields = _counted(_text_config(model))
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if hidden and heads and fields.get("head_dim") == hidden // heads:
        del fields["head_dim"]  # often left to be computed
    adapters = getattr(model, "peft_config", None) or {}
    if adapters:
        fields["adapters"] = {name: _counted(adapter.to_dict()) for name, adapter in adapters.items()}
    plain: dict[str, Any] = _plain(fields)
    return plain


def _counted(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in fields.items()
        if name not in HARMLESS
        and not any(word in name for word in HARMLESS_WORDS)
        and (value or name not in _OFF_IN_OLDER_RELEASES)
    }


def _rope_kinds(rotary: dict[str, Any]) -> Iterator[str]:
    """The kinds of rotation that parameters name, those of kinds of layers included."""
    for name, value in rotary.items():
        if isinstance(value, dict):
            yield from _rope_kinds(value)
        elif name in ("rope_type", "type"):
            yield str(value)


def _tokenizer(tokenizer: Any) -> Any:
    """What a tokenizer is. One in Python cannot serialize itself: its vocabulary, options and cuts."""
    # Padding is never used, and people set it as they like.
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        told = json.loads(backend.to_str())
        # `truncation` and `padding` are left over from the last call.
        kept = {name: told[name] for name in told if name not in ("version", "truncation", "padding")}
        return [special, _filled(kept), bool(getattr(tokenizer, "split_special_tokens", False))]
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if not str(name).endswith(("path", "file"))
    }
    return [
        type(tokenizer).__name__,
        special,
        sorted(tokenizer.get_vocab().items()),
        sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items()),
        {
            k: v
            for k, v in options.items()
            if isinstance(v, (bool, int, float, str)) and k not in _TOKENIZER_HARMLESS
        },
        [tokenizer(text)["input_ids"] for text in _CUTS],
    ]


_TOKENIZER_HARMLESS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "chat_template",
    "tokenizer_class",
)


def _filled(value: Any) -> Any:
    """Without what is false or empty: later releases of the library add such fields, and older ones omit them.

    A zero stays: it is the number of a token.
    """
    if isinstance(value, dict):
        kept = {key: _filled(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner or (inner == 0 and inner is not False)}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _template(template: Template) -> Any:
    """What a template is: of a chat template its text and what is put into it, not what it renders."""
    if template.chat is None:
        return [template.template_id, template.before, template.after, template.ask_before, template.ask_after,
                template.stops, template.special_tokens]  # fmt: skip
    return [template.template_id, template.chat.get_chat_template(), template.stops, template.special_tokens]


def _weights(model: Any, files: list[Any] | None) -> bytes:
    """The digest of the weights, remembered where it is known what they came from."""
    import transformers

    key = [files, str(model.dtype), type(model).__name__, transformers.__version__]
    known = recall("weights", key) if files else None
    if isinstance(known, str) and len(known) == 32:
        try:
            return bytes.fromhex(known)
        except ValueError:
            pass
    digest = _hash_weights(model)
    if files:
        remember("weights", key, digest.hex())
    return digest


def _hash_weights(model: Any) -> bytes:
    """Over names in order. Tied tensors count under each of their names, so that tied and copied are the same."""
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in model.state_dict().items()}
    total, done = blake3(), dict[Any, bytes]()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):  # options that quantizers keep among the weights
            total.update(f"{name}|{tensor!r}|".encode())
            continue
        if tensor.is_meta:
            raise ModelError(f"the weight {name} is not in memory: load the model whole, without offloading")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if same not in done:
            done[same] = _hash_tensor(tensor)
        total.update(f"{name}|{list(tensor.shape)}|".encode())
        total.update(done[same])
    return total.digest(length=16)


def _hash_tensor(tensor: torch.Tensor) -> bytes:
    """The digest of a tensor's values: floats count by value, so that a copy in a wider dtype is the same."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    if values.is_floating_point() and values.dtype not in (torch.bfloat16, torch.float64):
        values = values.float()
        if not bool((values.view(torch.int32) & 0xFFFF).any()):
            values = values.bfloat16()  # nothing is lost
    total = blake3(str(values.dtype).encode(), max_threads=blake3.AUTO)
    total.update(values.view(torch.uint8).numpy().data)
    return total.digest()
