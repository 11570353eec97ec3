"""Loading: what is understood is loaded by path, what is not is refused by name."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import ConfigError, ContextError, KvlinkError, ModelError, UnsupportedCacheError
from kvlink.model.loading import check_config, embedded_folder, language_model, load, wrap
from kvlink.model.restore import extract, join, view


def small(name: str, **values):
    return getattr(transformers, name)(vocab_size=64, hidden_size=32, num_hidden_layers=2, **values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "t5 is an encoder-decoder"),
        (small("MambaConfig"), "mamba"),
        (
            small("Qwen3NextConfig", layer_types=["linear_attention", "full_attention"]),
            "linear_attention",
        ),
        (
            small("LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "'dynamic' changes with length",
        ),
        (
            small(
                "Phi3Config",
                num_attention_heads=4,
                pad_token_id=0,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": [1.0] * 4,
                    "short_factor": [1.0] * 4,
                },
            ),
            "'longrope' changes with length",
        ),
    ],
    ids=["t5", "mamba", "qwen3-next", "dynamic rope", "longrope"],
)
def test_what_is_not_understood_is_refused_by_name(config, message):
    with pytest.raises(UnsupportedCacheError, match=message):
        check_config(config)


def test_an_unknown_cache_class_is_refused_by_name(tiny):
    with pytest.raises(UnsupportedCacheError, match="keeps a StaticCache"):
        extract(transformers.StaticCache(config=tiny.model.config, max_cache_len=8), 1)
    strange = DynamicCache(config=tiny.model.config)
    strange.layers[1] = SimpleNamespace(keys=None)
    with pytest.raises(UnsupportedCacheError, match="SimpleNamespace is not understood|layer 0"):
        extract(strange, 1)


def test_a_batch_is_refused(tiny):
    cache = DynamicCache(config=tiny.model.config)
    for index in range(len(cache.layers)):
        cache.update(torch.zeros(2, 2, 3, 64), torch.zeros(2, 2, 3, 64), index)
    with pytest.raises(UnsupportedCacheError, match="a batch of 2"):
        extract(cache, 3)


def test_joining_contexts_is_refused_by_name():
    with pytest.raises(ContextError, match="joining the caches of 2 contexts is not supported"):
        join(None, None)  # type: ignore[arg-type]


def test_a_cache_of_another_model_does_not_become_a_view(tiny, random_lm):
    from kvlink.errors import IdentityError
    from kvlink.model.prefill import prefill
    from tests.conftest import random_ids

    sliding = prefill(random_lm("gemma2-sliding"), random_ids(40))
    with pytest.raises(IdentityError, match="sliding window at one end only"):
        view(random_lm("qwen2"), sliding)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_can_be_chosen(checkpoint, dtype):
    assert load(str(checkpoint("qwen2")), dtype=dtype).dtype == dtype


def test_wrong_options_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="dtype must be"):
        load(str(checkpoint("qwen2")), dtype="int8")
    with pytest.raises(ModelError, match="cannot load"):
        load(str(checkpoint("qwen2")), device="nonsense")
    with pytest.raises(ModelError, match="no directory"):
        load("./not/there")


def test_pickled_weights_are_not_loaded(checkpoint, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint("qwen2"), folder)
    model = load(str(folder)).model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load"):
        load(str(folder))


def test_code_that_comes_with_a_model_is_not_run(checkpoint, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(checkpoint("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "made-up"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ModelError, match="cannot load"):
        load(str(folder))


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint("qwen2"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        load(str(folder))


def test_eager_attention_can_be_asked_for(checkpoint):
    lm = load(str(checkpoint("qwen2")), attention="eager")
    assert lm.attention == "eager"


def test_a_dtype_that_no_cache_travels_in_is_refused(checkpoint):
    lm = load(str(checkpoint("qwen2", "float32", 5)))
    with pytest.raises(UnsupportedCacheError, match="float64"):
        wrap("wide", lm.model.double(), lm.tokenizer)


def test_a_receiver_says_why_it_does_not_join_contexts(tiny):
    receiver, sender = Receiver(tiny), Sender(tiny)
    frames = [sender.pack(sender.read(text), "", "raw").frames for text in ("One text.", "Another text.")]
    with pytest.raises(ContextError, match="never attended to each other"):
        receiver.join(*(receiver.receive(f) for f in frames))


def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint, tmp_path):
    """transformers would draw it at random, another one each time, under one remembered digest."""
    folder = tmp_path / "lacking"
    shutil.copytree(checkpoint("qwen2"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(ModelError, match=f"lack weights .*{name}"):
            load(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", "1e-6"),
        ("hidden_size", [64]),
        ("num_attention_heads", 0),
        ("layer_types", 7),
        ("hidden_act", "x"),
    ],
)
def test_a_configuration_of_odd_values_is_refused_in_a_line(name, value, checkpoint, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(checkpoint("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(KvlinkError, match="odd"):
        load(str(folder))


def in_memory(folder):
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        AutoTokenizer.from_pretrained(folder),
    )


def test_a_model_in_memory_is_the_one_that_its_folder_loads(tiny):
    """With its calibration, too: either end may have it from a name."""
    lm = language_model(*in_memory(embedded_folder()))
    assert lm.fingerprint == tiny.fingerprint
    assert lm.profile is not None and lm.profile.digest == tiny.profile.digest
    lm.sketch.require_match(tiny.sketch)
    assert language_model(lm) is lm


def test_a_model_whose_weights_were_changed_in_memory_is_another(tiny):
    model, tokenizer = in_memory(embedded_folder())
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    lm = language_model(model, tokenizer)
    assert lm.profile is None
    assert lm.fingerprint.weights != tiny.fingerprint.weights


def test_what_is_no_model_is_refused(tiny):
    model, tokenizer = tiny.model, tiny.tokenizer
    for given, options, message in (
        ((model,), {}, "needs its tokenizer"),
        ((model, tokenizer), {"dtype": "float32"}, "loaded already: dtype"),
        ((tiny,), {"dtype": "float32"}, "loaded already: dtype"),
        ((tiny, tokenizer), {}, "a tokenizer goes with"),
        (("kvlink-tiny", tokenizer), {}, "a tokenizer goes with"),
        ((tokenizer,), {}, "expected a name, a path or a transformers model"),
        ((None,), {}, "got a NoneType"),
    ):
        with pytest.raises(ConfigError, match=message):
            language_model(*given, **options)
