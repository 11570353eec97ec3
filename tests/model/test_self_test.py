"""The self-test: right models pass, each wrong one is refused by name, and what was found is remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.agent.uses import require_usable, uses
from kvlink.errors import RecipeError, UnsupportedCacheError
from kvlink.model import self_test
from kvlink.model.generate import next_logits
from kvlink.model.loading import check_config, embedded_folder, load, wrap
from kvlink.model.restore import view
from kvlink.model.traits import Traits
from kvlink.recipe import Recipe
from tests.sweep.families import SMALL, make
from tests.sweep.verdicts import judge

TEXT = "Mira Dosh was born in Tavik. Ren Holt was born in Lisket. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(embedded_folder())


@pytest.mark.parametrize("family", SMALL)
def test_a_family_works_through_every_recipe_or_is_refused_by_name(family, tokenizer):
    model = make(family)
    assert model is not None
    row = judge(family, model, tokenizer)
    assert row.kinds <= {"exact", "refused"}, row
    if family in ("bert", "mamba", "deepseek_v3"):
        assert row.load.kind == "refused"
        assert family in row.load.words
    else:
        assert row.kinds == {"exact"}, row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "padded"),
    [
        ("falcon (ALiBi)", True),
        ("mpt", True),
        ("blenderbot-small", True),
        ("qwen3_moe", False),
        ("llama", False),
    ],
)
def test_rounding_hides_no_bias_and_looks_like_none(family, padded, dtype, tokenizer):
    """In half precision a bias by the index of keys is still seen, and what rounding does is not taken for one."""
    traits = wrap(family, make(family).to(dtype), tokenizer).traits
    assert traits.padded is padded
    assert not {"selection", "attention", "transform"} & set(traits.refused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_encoder_is_refused_in_every_precision(family, dtype, tokenizer):
    with pytest.raises(UnsupportedCacheError, match="an encoder's"):
        wrap(family, make(family).to(dtype), tokenizer)


def _broken(tokenizer, break_it, family: str = "llama"):
    """A model of which `break_it` changed what it does."""
    model = make(family)
    break_it(model)
    return wrap("broken", model, tokenizer)


def _patched(model, change):
    """The attention of every layer with `change(module, keywords)` before it."""

    def hook(module, arguments, keywords):
        change(module, keywords)
        return arguments, keywords

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def _by_index(model):
    """Positions by the number of keys, whatever is asked for: what models without position_ids do."""

    def change(module, keywords):
        cache, states = keywords.get("past_key_values"), keywords["hidden_states"]
        held = cache.get_seq_length(module.layer_idx) if cache is not None else 0
        places = torch.arange(held, held + states.shape[1])[None]
        keywords["position_embeddings"] = model.model.rotary_emb(states, places)

    _patched(model, change)


def _by_length(model):
    """A rotation that depends on how much there is: an old key is not what a new one would be."""

    def change(module, keywords):
        cache, states = keywords.get("past_key_values"), keywords["hidden_states"]
        held = cache.get_seq_length(module.layer_idx) if cache is not None else 0
        cosine, sine = keywords["position_embeddings"]
        shift = torch.tensor(0.01 * (held + states.shape[1]))
        keywords["position_embeddings"] = (
            cosine * shift.cos() - sine * shift.sin(),
            sine * shift.cos() + cosine * shift.sin(),
        )

    _patched(model, change)


def test_a_model_that_counts_keys_restores_pruned_caches_at_full_length(tokenizer):
    lm = _broken(tokenizer, _by_index)
    assert lm.traits.padded
    assert "counts keys" in lm.traits.refused["scope=head"]
    sender = Sender(lm)
    context = sender.read(TEXT)
    held = Receiver(lm).receive(sender.pack(context, "", "streaming@0.5 raw").frames)
    assert held.cache.layers[0].keys.shape[1] < context.cache.tokens, "what is held is what was sent"


def test_a_model_whose_answers_depend_on_how_it_was_read_is_refused(tokenizer):
    with pytest.raises(UnsupportedCacheError, match="llama: "):
        _broken(tokenizer, _by_length)


def test_a_model_that_sees_later_tokens_is_refused(tokenizer):
    def open_eyes(model):
        _patched(model, lambda _module, keywords: keywords.update(attention_mask=None))
        for layer in model.model.layers:
            layer.self_attn.is_causal = False

    with pytest.raises(UnsupportedCacheError, match=r"later tokens change|other logits"):
        _broken(tokenizer, open_eyes)


def test_a_rotation_that_is_not_understood_refuses_the_transform_alone(tokenizer):
    def cubed(model):
        rotary = model.model.rotary_emb

        def change(module, keywords):
            cosine, sine = keywords["position_embeddings"]
            turned = torch.atan2(sine, cosine) ** 3
            keywords["position_embeddings"] = (turned.cos(), turned.sin())

        assert rotary is not None
        _patched(model, change)

    lm = _broken(tokenizer, cubed)
    assert set(lm.traits.refused) == {"transform"}
    with pytest.raises(
        RecipeError, match=r"cannot be used with broken: llama: the keys of layer 0 .*; use int8"
    ):
        Sender(lm).recipe("transform=1")
    assert Sender(lm).recipe("q2c@0.5 int4")


def test_attention_that_cannot_be_seen_refuses_what_looks_at_it(tokenizer, monkeypatch):
    monkeypatch.setattr("kvlink.model.prefill.attention_layers", lambda _model: [])
    lm = _broken(tokenizer, lambda _model: None)
    assert set(lm.traits.refused) == {"attention"}
    with pytest.raises(RecipeError, match="use int8"):
        require_usable(lm, Recipe.parse("q2c@0.5 int4"))
    require_usable(lm, Recipe.parse("streaming@0.5 int4"))


@pytest.mark.parametrize("family", ["diffllama", "doge"])
def test_heads_that_look_at_each_others_values_keep_the_same_positions(family, tokenizer):
    """DiffLlama gives each head the values of two; Doge masks a head's keys by the values of all."""
    model = make(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):  # Doge's masks are even before it is trained
                parameter.normal_(0, 3)
    lm = wrap(family, model, tokenizer)
    with pytest.raises(RecipeError, match="its heads look at each other's keys or values"):
        require_usable(lm, Recipe.parse("q2c@0.5 raw scope=head"))
    row = judge(family, model, tokenizer)
    assert row.by_recipe["pruned"].kind == "exact", row


def test_attention_that_is_local_beyond_the_short_text_is_seen(tokenizer):
    """GPT-Neo's local layers count keys, of which the short text has fewer than their window."""
    kind = transformers.GPTNeoConfig
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        kind(
            vocab_size=3072, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, window_size=100,
            max_position_embeddings=1024, attention_types=[[["global", "local"], 1]], eos_token_id=1, bos_token_id=2,
        )
    ).float()  # fmt: skip
    lm = wrap("local", model, tokenizer)
    sender, receiver = Sender(lm), Receiver(lm)
    context = sender.read(TEXT * 8)
    held = receiver.receive(sender.pack(context, "", "random@0.4 raw").frames).cache
    ids, tokens = lm.question_ids("Where was Ren Holt born?", len(context.ids)), len(context.ids)
    assert tokens > 200
    seen = torch.zeros(tokens, dtype=torch.bool)
    seen[held.layers[0].positions[0]] = True
    masked = next_logits(lm, view(lm, context.cache), ids, tokens, seen)
    torch.testing.assert_close(next_logits(lm, view(lm, held), ids, tokens), masked, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("DogeConfig", {"keep_window_size": 64}, "picks 64 of its keys"),
        ("MoshiConfig", {"sliding_window": 64}, "cache slides"),
    ],
)
def test_what_only_long_texts_would_show_is_refused_by_the_configuration(kind, sizes, words):
    config = getattr(transformers, kind)(max_position_embeddings=512, **sizes)
    with pytest.raises(UnsupportedCacheError, match=words):
        check_config(config)
    for name in sizes:
        setattr(config, name, 512)
    check_config(config)


def test_logits_that_are_no_numbers_pass_nothing(tokenizer):
    def poison(model):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))

    with pytest.raises(UnsupportedCacheError, match="llama"):
        _broken(tokenizer, poison)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("raw", set()),
        ("text", set()),
        ("int8", set()),
        ("streaming@0.5 int4", {"selection"}),
        ("q2c@0.5 int4 scope=head", {"selection", "attention", "scope=head"}),
        ("streaming@0.5 raw when=during", {"selection", "when=during"}),
        ("transform=1", {"transform"}),
        ("q2c+draft@0.25 transform=0.5 rest=2", {"attention", "transform"}),
    ],
)
def test_what_a_recipe_asks_of_a_model(recipe, expected):
    assert set(uses(Recipe.parse(recipe))) == expected


def test_a_receiver_refuses_what_its_model_cannot_serve_before_a_segment(tiny):
    sender = Sender(tiny)
    frames = sender.pack(sender.read(TEXT), "", "streaming@0.5 raw").frames
    limited = replace(tiny, traits=replace(tiny.traits, refused={"selection": "it has a trait"}))
    with pytest.raises(RecipeError, match="it has a trait; use int8"):
        Receiver(limited).receive(frames[:1])


def test_the_second_load_runs_no_test(checkpoint, monkeypatch):
    first = load(str(checkpoint("qwen2", "float32", 11))).traits

    def fail(*_):
        raise AssertionError("the model was tested again")

    monkeypatch.setattr(self_test._Test, "run", fail)
    assert load(str(checkpoint("qwen2", "float32", 11))).traits == first


def test_a_model_made_in_memory_is_tested_each_time(tokenizer, monkeypatch):
    model = make("llama")
    wrap("once", model, tokenizer)
    monkeypatch.setattr(self_test._Test, "run", lambda _test: Traits(kv_heads=7))
    assert wrap("twice", model, tokenizer).traits.kv_heads == 7


@pytest.mark.parametrize(
    "data", [None, [], {}, {"kv_heads": 1}, {"refused": {"magic": ""}, "arrangements": []}, "x"]
)
def test_damaged_traits_count_as_none(data):
    assert Traits.from_json(data) is None


def test_traits_survive_their_json(tiny):
    assert Traits.from_json(tiny.traits.to_json()) == tiny.traits
