"""Fingerprints: the same model under another path is the same, a sibling is not."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlink.errors import ModelError
from kvlink.model import fingerprint
from kvlink.model.fingerprint import stamp
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


def test_a_head_size_that_is_left_to_be_computed_is_the_same(checkpoint, tmp_path):
    folder = _configured(tmp_path / "computed", checkpoint("qwen2"))
    told = json.loads((folder / "config.json").read_text())
    assert told.pop("head_dim") == told["hidden_size"] // told["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(told))
    assert load(str(folder)).fingerprint == load(str(checkpoint("qwen2"))).fingerprint


def test_another_window_is_another_architecture(checkpoint, tmp_path):
    other = _configured(tmp_path / "window", checkpoint("mistral-sliding"), sliding_window=16)
    here, there = load(str(checkpoint("mistral-sliding"))).fingerprint, load(str(other)).fingerprint
    assert here.architecture != there.architecture


def _cut_merges(tokenizer: dict) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]


def _swap_words(tokenizer: dict) -> None:
    words = tokenizer["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]


def _append_eos(tokenizer: dict) -> None:
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }


def _another_added_token(tokenizer: dict) -> None:
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 3099, "content": "<note>"})


@pytest.mark.parametrize("change", [_cut_merges, _swap_words, _append_eos, _another_added_token])
def test_another_tokenizer_is_refused_whatever_differs(checkpoint, tmp_path, change):
    folder = tmp_path / "tokens"
    shutil.copytree(checkpoint("qwen2"), folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    here, there = load(str(checkpoint("qwen2"))).fingerprint, load(str(folder)).fingerprint
    assert here.tokenizer != there.tokenizer
    assert here.weights == there.weights


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"vocab": {"a": 0}}, {"vocab": {"b": 0}}, False),
        ({"vocab": {"a": 0}}, {"vocab": {}}, False),
        ({"id": 0}, {}, False),
        ({"score": 0.0}, {"score": -1.0}, False),
        ({"strip": True}, {"strip": False}, False),
        ({"strip": False}, {}, True),
        ({"model": {"prefix": "", "drop": None, "list": []}}, {}, True),
        ([{"a": None}, {}], [{}, {}], True),
        ([{"a": 1}, {}], [{}, {"a": 1}], False),
    ],
)
def test_only_what_is_false_or_empty_may_be_missing(one, two, same):
    assert (fingerprint._filled(one) == fingerprint._filled(two)) == same


def test_the_token_of_padding_does_not_matter(checkpoint):
    lm = load(str(checkpoint("qwen2")))
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    assert wrap("padded", lm.model, lm.tokenizer).fingerprint == lm.fingerprint


def test_what_a_tokenizer_was_used_for_does_not_matter(checkpoint):
    lm = load(str(checkpoint("qwen2")))
    lm.tokenizer(["one", "one and two"], padding=True, truncation=True, max_length=7, return_tensors="pt")
    assert wrap("used", lm.model, lm.tokenizer).fingerprint == lm.fingerprint


def test_the_second_time_reads_no_weights(checkpoint, monkeypatch):
    first = load(str(checkpoint("qwen2"))).fingerprint

    def fail(*arguments):
        raise AssertionError("weights were hashed again")

    monkeypatch.setattr(fingerprint, "_hash_tensor", fail)
    assert load(str(checkpoint("qwen2"))).fingerprint == first


@pytest.mark.parametrize("value", ["zz", "", "00", 7, None, [], {"a": 1}, "g" * 32])
def test_a_damaged_memory_counts_as_none(checkpoint, monkeypatch, value):
    first = load(str(checkpoint("qwen2"))).fingerprint
    monkeypatch.setattr(fingerprint, "recall", lambda *_: value)
    assert load(str(checkpoint("qwen2"))).fingerprint == first


def _replaced(file: Path) -> None:
    """Other weights as a new file, as an image that is built again has them."""
    tensors = load_file(file)
    file.unlink()
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file, {"format": "pt"})


def _overwritten(file: Path) -> None:
    """Other weights in the same file."""
    tensors = load_file(file)
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, file.with_name("new"), {"format": "pt"}
    )
    data = file.with_name("new").read_bytes()
    file.with_name("new").unlink()
    with file.open("r+b") as target:
        target.write(data)


def _swapped(file: Path) -> None:
    """Other weights that were prepared beside, with the size and the times of the old ones."""
    tensors = load_file(file)
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, file.with_name("new"), {"format": "pt"}
    )
    os.replace(file.with_name("new"), file)


@pytest.mark.parametrize("replace", [_replaced, _overwritten, _swapped])
def test_weights_of_equal_path_size_and_time_are_hashed_again(checkpoint, tmp_path, replace):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2"), folder)
    file = folder / "model.safetensors"
    os.utime(file, (1, 1))
    size, first = file.stat().st_size, load(str(folder)).fingerprint
    assert load(str(folder)).fingerprint == first
    replace(file)
    os.utime(file, (1, 1))
    assert (file.stat().st_size, file.stat().st_mtime) == (size, 1)
    assert load(str(folder)).fingerprint.weights != first.weights


def test_what_changes_while_it_is_read_is_not_remembered(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2"), folder)
    stamps = iter([[["before"]], [["after"]]])
    monkeypatch.setattr("kvlink.model.loading.stamp", lambda _: next(stamps))
    monkeypatch.setattr(fingerprint, "remember", lambda *_: pytest.fail("remembered"))
    assert load(str(folder)).fingerprint


@pytest.mark.parametrize(
    "stray", ["adapter.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_files_that_are_not_loaded_do_not_count(checkpoint, tmp_path, stray):
    folder = tmp_path / "stray"
    shutil.copytree(checkpoint("qwen2"), folder)
    (folder / stray).write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert load(str(folder)).fingerprint == load(str(checkpoint("qwen2"))).fingerprint


def test_a_file_that_shadows_another_counts(checkpoint, tmp_path):
    """`model.safetensors` is read before the shards that an index names."""
    lm, folder = load(str(checkpoint("qwen2"))), tmp_path / "shadowed"
    lm.model.save_pretrained(folder, max_shard_size="300kB")
    lm.tokenizer.save_pretrained(folder)
    assert load(str(folder)).fingerprint == lm.fingerprint
    shutil.copy(checkpoint("qwen2", "float32", 1) / "model.safetensors", folder)
    assert load(str(folder)).fingerprint == load(str(checkpoint("qwen2", "float32", 1))).fingerprint


def test_an_adapter_is_never_remembered(checkpoint, tmp_path):
    shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    assert stamp(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert stamp(tmp_path / "model") is None


def test_a_copy_in_a_wider_dtype_is_the_same(checkpoint, tmp_path):
    short = load(str(checkpoint("qwen2", "bfloat16")))
    wide = load(str(checkpoint("qwen2", "bfloat16")), dtype="float32")
    wide.model.save_pretrained(tmp_path / "wide")
    wide.tokenizer.save_pretrained(tmp_path / "wide")
    assert load(str(tmp_path / "wide")).dtype == "float32"
    assert load(str(tmp_path / "wide"), dtype="bfloat16").fingerprint == short.fingerprint
    assert load(str(tmp_path / "wide")).fingerprint == short.fingerprint


def test_rounded_weights_are_another_model(checkpoint):
    whole = load(str(checkpoint("qwen2"))).fingerprint
    assert load(str(checkpoint("qwen2")), dtype="bfloat16").fingerprint.weights != whole.weights


def test_swapped_layers_are_another_model(checkpoint, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(checkpoint("qwen2"), folder)
    tensors = load_file(folder / "model.safetensors")
    a, b = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.k_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load(str(folder)).fingerprint.weights != load(str(checkpoint("qwen2"))).fingerprint.weights


def test_weights_that_are_not_in_memory_are_refused(random_lm):
    lm = random_lm("qwen2")
    hollow = type(lm.model)(lm.model.config).to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        wrap("hollow", hollow, lm.tokenizer)


def test_files_that_change_are_hashed_again(checkpoint, tmp_path):
    folder = tmp_path / "changing"
    shutil.copytree(checkpoint("qwen2"), folder)
    first = load(str(folder)).fingerprint.weights
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert load(str(folder)).fingerprint.weights != first


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_model_in_memory_is_the_same_as_its_checkpoint(random_lm, architecture):
    lm = random_lm(architecture)
    assert wrap("in memory", lm.model, lm.tokenizer).fingerprint == lm.fingerprint


def test_tied_weights_and_a_copy_of_them_are_the_same(tiny):
    assert wrap("in memory", tiny.model, tiny.tokenizer).fingerprint == tiny.fingerprint
    untied = copy.deepcopy(tiny.model)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert wrap("untied", untied, tiny.tokenizer).fingerprint == tiny.fingerprint
    with torch.no_grad():
        untied.lm_head.weight[0] += 1
    assert wrap("untied", untied, tiny.tokenizer).fingerprint.weights != tiny.fingerprint.weights


@pytest.mark.parametrize(
    ("one", "two"),
    [(1e-5, 9.999999747378752e-06), (10000, 10000.0), (1, True), ([1, 0], [True, False]), (None, None)],
)
def test_equal_numbers_are_equal_however_they_are_written(one, two):
    assert fingerprint._digest(fingerprint._plain({"a": one})) == fingerprint._digest(
        fingerprint._plain({"a": two})
    )


@pytest.mark.parametrize(
    ("one", "two"), [(1e-5, 2e-5), (1, 2), (True, False), ([1], [1, 1]), (0, None), ("1", 1)]
)
def test_other_values_are_others(one, two):
    assert fingerprint._digest(fingerprint._plain({"a": one})) != fingerprint._digest(
        fingerprint._plain({"a": two})
    )
