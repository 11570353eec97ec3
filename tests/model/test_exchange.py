"""Plain `model.generate` goes on from any cache, whole or not, as kvlink's own generation does."""

from __future__ import annotations

import pytest
import torch

from kvlink.cache import KVCache
from kvlink.errors import ContextError
from kvlink.model.exchange import generate_inputs, to_dynamic_cache
from kvlink.model.generate import answer
from kvlink.model.loading import LanguageModel, wrap
from kvlink.model.prefill import prefill
from tests.sweep.families import make

TEXT = "Mira Dosh was born in Tavik. Ren Holt was born in Lisket. " * 3
QUESTION = "Where was Ren Holt born?"
OTHER = "Who was born in Tavik?"
NEW_TOKENS = 16
ARCHITECTURES = ("qwen2", "llama", "gemma2-sliding", "gemma3-sliding")


@pytest.fixture(scope="module", params=["falcon (ALiBi)", "mpt"])
def counts_keys(request, tiny) -> LanguageModel:
    """A model whose attention takes the number of keys for their positions (ALiBi)."""
    lm = wrap(request.param, make(request.param), tiny.tokenizer)
    assert lm.traits.padded
    return lm


def kinds_of(lm: LanguageModel) -> dict[str, KVCache]:
    """The cache of TEXT whole, cut down to the same positions everywhere, and cut down head by head."""
    whole = prefill(lm, lm.context_ids(TEXT))
    tokens = whole.tokens
    shared = torch.tensor(sorted({0, *range(1, tokens, 3), tokens - 1}))
    drawn = torch.rand(
        len(whole.layers), lm.traits.kv_heads, tokens, generator=torch.Generator().manual_seed(0)
    )
    each = drawn.argsort(-1)[..., :40].sort(-1).values
    return {"whole": whole, "shared": whole.select(shared), "by head": whole.select(each)}


def plain(lm: LanguageModel, inputs: dict, **options) -> list[list[int]]:
    """New tokens of every returned sequence, to the first that ends it."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    found = lm.model.generate(**inputs, **options)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def own(lm: LanguageModel, cache: KVCache, question: str = QUESTION) -> list[int]:
    return list(answer(lm, cache, question, max_new_tokens=NEW_TOKENS).token_ids)


@pytest.mark.parametrize("kind", ["whole", "shared", "by head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_generate_gives_the_tokens_of_our_own(random_lm, architecture, kind):
    lm = random_lm(architecture)
    cache = kinds_of(lm)[kind]
    expected = own(lm, cache)
    (found,) = plain(lm, generate_inputs(lm, cache, QUESTION))
    assert found[: len(expected)] == expected


@pytest.mark.parametrize("kind", ["whole", "shared"])
def test_a_model_that_counts_keys_gets_a_mask_instead(counts_keys, kind):
    cache = kinds_of(counts_keys)[kind]
    inputs = generate_inputs(counts_keys, cache, QUESTION)
    assert int(inputs["attention_mask"].sum()) == cache.layers[0].keys.shape[1] + inputs["input_ids"].shape[1]
    (found,) = plain(counts_keys, inputs)
    expected = own(counts_keys, cache)
    assert found[: len(expected)] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_cache_is_one_like_any_other(random_lm, architecture):
    """Whoever has the context's token ids gives them all, as after a prefill of their own."""
    lm = random_lm(architecture)
    ids, cache = lm.context_ids(TEXT), kinds_of(lm)["whole"]
    whole = torch.tensor([ids + lm.question_ids(QUESTION, len(ids))])
    (found,) = plain(lm, {"input_ids": whole, "past_key_values": to_dynamic_cache(lm, cache)})
    assert found == plain(lm, {"input_ids": whole, "attention_mask": torch.ones_like(whole)})[0]


@pytest.mark.parametrize("kind", ["shared", "by head"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2-sliding"])
def test_the_bare_cache_of_fewer_positions_is_refused(random_lm, architecture, kind):
    lm = random_lm(architecture)
    cache = kinds_of(lm)[kind]
    with pytest.raises(ContextError, match=rf"of {cache.tokens} positions.*generate_inputs\(question\)"):
        to_dynamic_cache(lm, cache)


@pytest.mark.parametrize("kind", ["whole", "shared"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2-sliding"])
def test_a_generation_leaves_the_cache_as_it_was(random_lm, architecture, kind):
    lm = random_lm(architecture)
    cache = kinds_of(lm)[kind]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    inputs = generate_inputs(lm, cache, QUESTION)
    first = plain(lm, inputs)
    assert plain(lm, generate_inputs(lm, cache, OTHER))[0][: len(own(lm, cache, OTHER))] == own(
        lm, cache, OTHER
    )
    assert plain(lm, inputs) == first, "the same inputs serve again"
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize("kind", ["whole", "shared", "by head"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2-sliding"])
def test_beams_and_samples(random_lm, architecture, kind):
    """Beams over a cache score as over one read of everything that is attended to; samples follow their seed."""
    lm = random_lm(architecture)
    cache = kinds_of(lm)[kind]
    beams = plain(lm, generate_inputs(lm, cache, QUESTION, beams=3), num_beams=3, num_return_sequences=3)
    assert len(beams) == 3 and len({tuple(beam) for beam in beams}) == 3
    if kind == "whole":
        ids = lm.context_ids(TEXT)
        whole = torch.tensor([ids + lm.question_ids(QUESTION, len(ids))])
        alone = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        assert beams == plain(lm, alone, num_beams=3, num_return_sequences=3)

    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        inputs = generate_inputs(lm, cache, QUESTION, beams=2)
        return plain(lm, inputs, do_sample=True, temperature=2.0, num_return_sequences=2)

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("question", "beams", "message"),
    [("", 1, "question is empty"), (QUESTION, 0, "beams must be"), (QUESTION, 10**9, "beams must be")],
)
def test_what_cannot_be_asked_is_refused(random_lm, question, beams, message):
    lm = random_lm("qwen2")
    with pytest.raises(ContextError, match=message):
        generate_inputs(lm, kinds_of(lm)["whole"], question, beams)
