"""Fingerprints: the same model under another path is the same, a sibling is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvlink.model import fingerprint
from kvlink.model.loading import load, wrap
from tests.conftest import ARCHITECTURES


def test_the_same_weights_under_another_path_are_the_same(checkpoint, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(checkpoint("qwen2"), folder)
    assert load(str(folder)).fingerprint == load(str(checkpoint("qwen2"))).fingerprint


def test_sharding_does_not_matter(checkpoint, tmp_path):
    lm = load(str(checkpoint("qwen2")))
    folder = tmp_path / "sharded"
    lm.model.save_pretrained(folder, max_shard_size="300kB")
    lm.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load(str(folder)).fingerprint.weights == lm.fingerprint.weights


def test_one_changed_weight_is_another_model(checkpoint, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint("qwen2"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.001
    save_file(tensors, file, {"format": "pt"})
    here, there = load(str(checkpoint("qwen2"))).fingerprint, load(str(folder)).fingerprint
    assert here.weights != there.weights
    assert (here.architecture, here.rotary, here.tokenizer) == (
        there.architecture, there.rotary, there.tokenizer,
    )  # fmt: skip


def _configured(folder: Path, source: Path, **changes) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_another_rotation_is_another_model(checkpoint, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 77.0}
    other = _configured(tmp_path / "rope", checkpoint("qwen2"), rope_parameters=rope)
    here, there = load(str(checkpoint("qwen2"))).fingerprint, load(str(other)).fingerprint
    assert here.rotary != there.rotary
    assert here.weights == there.weights


def test_another_window_is_another_architecture(checkpoint, tmp_path):
    other = _configured(tmp_path / "window", checkpoint("mistral-sliding"), sliding_window=16)
    here, there = load(str(checkpoint("mistral-sliding"))).fingerprint, load(str(other)).fingerprint
    assert here.architecture != there.architecture


def test_another_vocabulary_is_another_tokenizer(checkpoint, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(checkpoint("qwen2"), folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = data["model"]["merges"][:-1]
    path.write_text(json.dumps(data))
    here, there = load(str(checkpoint("qwen2"))).fingerprint, load(str(folder)).fingerprint
    assert here.tokenizer != there.tokenizer or here == there


def test_the_second_time_reads_no_weights(checkpoint, monkeypatch):
    first = load(str(checkpoint("qwen2"))).fingerprint

    def fail(*arguments):
        raise AssertionError("weights were hashed again")

    monkeypatch.setattr(fingerprint, "_hash_tensor", fail)
    assert load(str(checkpoint("qwen2"))).fingerprint == first


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": "zz"}', "null"])
def test_a_damaged_memory_counts_as_none(checkpoint, tmp_path, monkeypatch, content):
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    (tmp_path / "fingerprints.json").write_text(content)
    assert load(str(checkpoint("qwen2"))).fingerprint.weights


def test_files_that_change_are_hashed_again(checkpoint, tmp_path):
    folder = tmp_path / "changing"
    shutil.copytree(checkpoint("qwen2"), folder)
    first = load(str(folder)).fingerprint.weights
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert load(str(folder)).fingerprint.weights != first


# GPT-NeoX has other names in memory than on disk.
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt-neox"}))
def test_a_model_in_memory_is_the_same_as_its_checkpoint(random_lm, architecture):
    lm = random_lm(architecture)
    assert wrap("in memory", lm.model, lm.tokenizer).fingerprint == lm.fingerprint


def test_tied_weights_count_once(tiny):
    assert wrap("in memory", tiny.model, tiny.tokenizer).fingerprint == tiny.fingerprint
