"""The behavioural probe: one model is one whatever it runs on, what acts otherwise is refused whatever its files say."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import kvlink
from kvlink.errors import IdentityError, ModelError
from kvlink.model import probe
from kvlink.model.loading import load, wrap
from kvlink.model.probe import probe_ids, sketch_of
from kvlink.sketch import Sketch
from kvlink.wire.messages import sketch_to_proto
from tests.conftest import ARCHITECTURES

TEXT = "Mira Dosh was born in Tavik. Ren Holt was born in Lisket. " * 3


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_model_matches_itself_however_it_computes(random_lm, architecture, one_thread):
    lm = random_lm(architecture)
    torch.set_num_threads(2)
    lm.sketch.require_match(sketch_of(lm.model))
    lm.model.set_attn_implementation("eager")
    try:
        lm.sketch.require_match(sketch_of(lm.model))
    finally:
        lm.model.set_attn_implementation(lm.attention)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_short_weights_are_widened_and_stay_what_they_are(random_lm, architecture):
    lm = random_lm(architecture, "bfloat16")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    found = sketch_of(lm.model)
    after = lm.model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items()
    )
    wide = copy.deepcopy(lm.model).float()
    assert found == sketch_of(wide) == lm.sketch


def test_weights_are_restored_where_reading_fails(random_lm, monkeypatch):
    lm = random_lm("llama", "bfloat16")
    layer = lm.model.model.layers[2]
    monkeypatch.setattr(layer.mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ModelError, match=r"llama: cannot read 64 tokens: ZeroDivisionError"):
        sketch_of(lm.model)
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def _other_rotation(model):
    model.model.rotary_emb.inv_freq *= 0.9


def _other_norm(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1


def _other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


def _other_scale_in_the_last_layer_but_one(model):
    model.model.layers[-2].self_attn.scaling *= 2


def _hooked(model):
    model.model.layers[1].register_forward_hook(lambda _m, _i, output: output * 1.1)


@pytest.mark.parametrize(
    "change",
    [_other_rotation, _other_norm, _other_activation, _other_scale_in_the_last_layer_but_one, _hooked],
)
def test_what_no_fingerprint_sees_is_refused_by_the_probe(random_lm, change):
    lm = random_lm("qwen2")
    model = copy.deepcopy(lm.model)
    change(model)
    other = wrap("other", model, lm.tokenizer)
    assert other.fingerprint == lm.fingerprint
    sender, receiver = kvlink.Sender(lm), kvlink.Receiver(other)
    data = kvlink.pack(sender, sender.read(TEXT), "Who?", kvlink.Recipe.parse("raw"))
    with pytest.raises(IdentityError, match=r"probe: the caches of a fixed text differ from the .* of layer"):
        kvlink.unpack(receiver, data)
    kvlink.unpack(receiver, kvlink.pack(sender, sender.read(TEXT), "Who?", kvlink.Recipe.parse("text")))


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_a_fine_tune_is_refused_by_the_probe_alone(random_lm, share):
    lm = random_lm("qwen2")
    model, generator = copy.deepcopy(lm.model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(IdentityError, match="probe"):
        lm.sketch.require_match(sketch_of(model))


def test_a_transfer_without_a_sketch_is_refused(tiny):
    sender = kvlink.Sender(replace(tiny, sketch=None))
    data = kvlink.pack(sender, sender.read(TEXT), "Who?", kvlink.Recipe.parse("int8"))
    with pytest.raises(IdentityError, match="tells no sketch"):
        kvlink.unpack(kvlink.Receiver(tiny), data)


def test_ids_follow_from_the_size_of_the_vocabulary_alone(random_lm):
    ids = probe_ids(random_lm("llama").model)
    assert ids == probe_ids(random_lm("qwen2", "bfloat16", 1).model)
    assert len(ids) == probe.TOKENS
    model = copy.deepcopy(random_lm("llama").model)
    model.config.bos_token_id, model.config.eos_token_id = ids[3], [ids[5], ids[6]]
    assert probe_ids(model) == ids
    model.config.max_position_embeddings = 9
    assert probe_ids(model) == ids[:9]


def test_a_sketch_is_short_on_the_wire(tiny):
    assert sketch_to_proto(tiny.sketch).ByteSize() < 120
    layers, numbers = 30, tiny.sketch.numbers * 2
    assert sketch_to_proto(Sketch(layers, numbers)).ByteSize() < 240


def test_the_second_time_reads_nothing(checkpoint, monkeypatch):
    first = load(str(checkpoint("qwen2"))).sketch
    monkeypatch.setattr(probe, "sketch_of", lambda _: pytest.fail("read again"))
    assert load(str(checkpoint("qwen2"))).sketch == first


@pytest.mark.parametrize(
    "value", [[], [4], [4, [1]], [4, ["x"] * 80], ["a", "b"], {}, "x", 7, [None, None], [1, None]]
)
def test_a_damaged_memory_counts_as_none(checkpoint, monkeypatch, value):
    first = load(str(checkpoint("qwen2"))).sketch
    monkeypatch.setattr(probe, "recall", lambda *_: value)
    assert load(str(checkpoint("qwen2"))).sketch == first


def test_a_model_in_memory_is_read_each_time(random_lm, monkeypatch):
    monkeypatch.setattr(probe, "recall", lambda *_: pytest.fail("recalled"))
    lm = random_lm("qwen2")
    assert wrap("again", lm.model, lm.tokenizer).sketch == lm.sketch
