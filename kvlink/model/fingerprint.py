"""Fingerprints: who a model is, by components, independent of path, sharding and library version.

    weights       every tensor's name, dtype, shape and bytes, in the order of names
    architecture  the configuration fields that change what a cache means
    rotary        the rotary frequencies that the model computes with
    tokenizer     the vocabulary and how probe texts are cut
    template      what is put around context and question

The weights of a checkpoint are hashed once and remembered under the files' names, sizes and
times in the user's cache directory (`KVLINK_CACHE_DIR`), so the second time is cheap.

Does not know: caches, peers. Place on the path: before it; compared before any byte moves.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open

from kvlink.model.template import Template
from kvlink.payload import Fingerprint

_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "intermediate_size", "hidden_act", "hidden_activation", "rms_norm_eps",
    "layer_norm_eps", "sliding_window", "layer_types", "use_sliding_window", "max_window_layers",
    "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "use_parallel_residual", "tie_word_embeddings", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
_PROBES = ("The river bends twice.\n\n", " 12,345.67 – naïve façade 東京 🙂", "\tdef f(x):  return x", "")


def fingerprint_of(model: Any, tokenizer: Any, template: Template, folder: Path | None) -> Fingerprint:
    """The fingerprint of a loaded model; `folder` holds its checkpoint, None for one made in memory."""
    files = sorted(folder.glob("*.safetensors")) if folder else []
    return Fingerprint(
        weights=_weights_of_files(files) if files else _weights_of_model(model),
        architecture=_digest(_architecture(model.config)),
        rotary=_digest(_rotary(model)),
        tokenizer=_digest(_tokenizer(tokenizer)),
        template=template.digest(),
    )


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return blake3(text.encode()).digest(length=16)


def _architecture(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in _ARCHITECTURE}


def _rotary(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            found[name] = buffer.detach().float().cpu().tolist()
    for name, module in model.named_modules():
        if hasattr(module, "attention_scaling"):
            found[f"{name}.scaling"] = float(module.attention_scaling)
    return found


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probes": [tokenizer(text)["input_ids"] for text in _PROBES],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }


def _hash_tensor(total: Any, name: str, tensor: torch.Tensor) -> None:
    head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    total.update(head.encode())
    total.update(blake3(data.data, max_threads=blake3.AUTO).digest())


def _weights_of_model(model: Any) -> bytes:
    """The digest that the model's checkpoint would have: tied weights are saved once.

    Where transformers names tensors otherwise in memory than on disk (GPT-NeoX) the two differ:
    then both ends must load from a directory.
    """
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    total = blake3()
    for name in sorted(set(state) - set(tied)):
        _hash_tensor(total, name, state[name])
    return total.digest(length=16)


def _weights_of_files(files: list[Path]) -> bytes:
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = _digest(stats).hex()
    known = _read_memory()
    if key in known:
        return bytes.fromhex(known[key])
    owner: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            owner |= dict.fromkeys(handle.keys(), file)
    total = blake3()
    handles = {file: safe_open(file, "pt") for file in files}
    for name in sorted(owner):
        _hash_tensor(total, name, handles[owner[name]].get_tensor(name))
    digest = total.digest(length=16)
    _write_memory({**known, key: digest.hex()})
    return digest


def cache_dir() -> Path:
    """Where kvlink remembers what is slow to compute: `KVLINK_CACHE_DIR` or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("KVLINK_CACHE_DIR") or os.path.join(home, "kvlink"))


def _read_memory() -> dict[str, str]:
    """What was hashed before; anything unreadable counts as nothing."""
    try:
        known = json.loads((cache_dir() / "fingerprints.json").read_text())
        return {k: v for k, v in known.items() if isinstance(v, str) and len(bytes.fromhex(v)) == 16}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_memory(known: dict[str, str]) -> None:
    """Replace the file in one step; a cache that cannot be written is only slower."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_dir(), delete=False) as handle:
            json.dump(known, handle)
        os.replace(handle.name, cache_dir() / "fingerprints.json")
    except OSError:
        return
