"""A restored cache is as good as never having left; a pruned one gives what masking gives.

Every architecture is a random checkpoint, saved and loaded by path. The oracle is the model
itself, on the whole text at once, or with a mask instead of a pruned cache.
"""

from __future__ import annotations

import pytest
import torch

from kvlink.cache import KVCache
from kvlink.errors import UnsupportedCacheError
from kvlink.model.generate import next_logits
from kvlink.model.prefill import prefill, read_context, read_question
from kvlink.model.restore import view
from kvlink.recipe import Recipe
from tests.conftest import ARCHITECTURES, random_ids
from tests.segments import there_and_back

CONTEXT, QUESTION = 100, 9
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.005}
KEPT = torch.tensor(sorted({*range(4), *range(10, 60, 3), *range(92, 100)}))


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request) -> str:
    return request.param


def travelled(cache: KVCache, recipe: str) -> KVCache:
    """The cache as the receiver has it."""
    return there_and_back(cache, Recipe.parse(recipe))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["raw", "lossless"])
def test_a_lossless_restore_is_never_having_left(random_lm, architecture, dtype, recipe):
    lm = random_lm(architecture, dtype)
    ids, question = random_ids(CONTEXT), random_ids(QUESTION, 1)
    cache = prefill(lm, ids)
    stayed = next_logits(lm, view(lm, cache), question, CONTEXT)
    left = next_logits(lm, view(lm, travelled(cache, recipe)), question, CONTEXT)
    assert torch.equal(stayed, left)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_context_then_question_equals_one_read_of_both(random_lm, architecture, dtype):
    lm = random_lm(architecture, dtype)
    ids, question = random_ids(CONTEXT), random_ids(QUESTION, 1)
    with torch.inference_mode():
        whole = lm.model(torch.tensor([ids + question])).logits[0, -QUESTION:].float()
    split = next_logits(lm, view(lm, travelled(prefill(lm, ids), "raw")), question, CONTEXT)
    assert (whole - split).abs().max() < TOLERANCE[dtype] * whole.abs().max()


def _masked_logits(lm, cache, question):
    """The oracle of pruning: the full cache, with dropped positions masked in full layers only."""
    hidden = torch.ones(CONTEXT, dtype=torch.bool)
    hidden[KEPT] = False
    full = [i for i, layer in enumerate(cache.layers) if not layer.sliding]

    def poison(module, arguments, keywords):
        # Full-attention layers see a mask that hides the dropped positions; the others do not.
        if module.layer_idx in full:
            mask = torch.full((1, 1, QUESTION, CONTEXT + QUESTION), -torch.inf)
            mask[..., torch.cat([~hidden, torch.zeros(QUESTION, dtype=torch.bool)])] = 0
            mask[0, 0, :, CONTEXT:] = torch.full((QUESTION, QUESTION), -torch.inf).triu(1)
            keywords["attention_mask"] = mask
        return arguments, keywords

    modules = [
        m for m in lm.model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    ]
    handles = [m.register_forward_pre_hook(poison, with_kwargs=True) for m in modules]
    lm.model.set_attn_implementation("eager")
    try:
        return next_logits(lm, view(lm, cache), question, CONTEXT)
    finally:
        lm.model.set_attn_implementation(lm.attention)
        for handle in handles:
            handle.remove()


def test_a_pruned_cache_gives_what_masking_gives(random_lm, architecture):
    lm = random_lm(architecture)
    question = random_ids(QUESTION, 1)
    cache = prefill(lm, random_ids(CONTEXT))
    masked = _masked_logits(lm, cache, question)
    pruned = next_logits(lm, view(lm, travelled(cache.select(KEPT), "raw")), question, CONTEXT)
    assert (masked - pruned).abs().max() < 2e-5
    if not all(layer.sliding for layer in cache.layers):
        full = next_logits(lm, view(lm, cache), question, CONTEXT)
        assert (full - pruned).abs().max() > 1e-3, "dropping positions must change something"


def test_a_cache_pruned_per_head_keeps_each_heads_own_positions(random_lm):
    lm = random_lm("qwen2")
    cache = prefill(lm, random_ids(CONTEXT))
    positions = torch.stack([torch.randperm(CONTEXT)[:30].sort().values for _ in range(8)]).reshape(4, 2, 30)
    kept = travelled(cache.select(positions), "raw")
    for index, layer in enumerate(kept.layers):
        for head in range(2):
            places = positions[index, head]
            assert torch.equal(layer.positions[head], places)
            assert torch.equal(layer.keys[head], cache.layers[index].keys[head, places])
            assert torch.equal(layer.values[head], cache.layers[index].values[head, places])


def _eager_attention(lm, ids):
    lm.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return lm.model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        lm.model.set_attn_implementation(lm.attention)


def test_captured_evidence_equals_eager_attention(random_lm, architecture):
    lm = random_lm(architecture)
    ids, question = random_ids(CONTEXT), random_ids(QUESTION, 1)
    cache = prefill(lm, ids)
    seen = read_question(lm, cache, question[:5], question[5:])
    alone = read_context(lm, ids, {"mass", "window"}, 16)
    asked = read_context(lm, ids, {"asked_window"}, 16, question)
    heads = cache.layers[0].keys.shape[0]
    for index, weights in enumerate(_eager_attention(lm, ids + question)):
        if cache.layers[index].sliding:
            assert seen.question[index].abs().max() == 0
            continue
        grouped = weights[0].unflatten(0, (heads, -1)).mean(1)
        assert torch.allclose(seen.question[index], grouped[:, 100:105, :100].mean(1), atol=1e-6)
        assert torch.allclose(seen.draft[index], grouped[:, 105:, :100].mean(1), atol=1e-6)
        assert torch.allclose(alone.mass[index], grouped[:, :100, :100].sum(1), atol=1e-5)
        assert torch.allclose(alone.window[index, :, :84], grouped[:, 84:100, :84].mean(1), atol=1e-6)
        assert alone.window[index, :, 84:].abs().max() == 0
        assert asked.asked_window_tokens == 7
        last = grouped[:, 93:109, :100].mean(1)  # 16 queries: 7 of the context and the question's 9
        assert torch.allclose(asked.asked_window[index, :, :93], last[:, :93], atol=1e-6)
        assert asked.asked_window[index, :, 93:].abs().max() == 0


def test_prefill_of_kept_tokens_is_reading_them_at_their_own_positions(random_lm):
    lm = random_lm("llama")
    ids, question = random_ids(CONTEXT), random_ids(QUESTION, 1)
    cache = prefill(lm, ids, KEPT)
    assert cache.tokens == CONTEXT
    chosen = [ids[i] for i in KEPT] + question
    places = torch.cat([KEPT, torch.arange(CONTEXT, CONTEXT + QUESTION)])
    with torch.inference_mode():
        whole = lm.model(torch.tensor([chosen]), position_ids=places[None]).logits[0, -QUESTION:]
    split = next_logits(lm, view(lm, travelled(cache, "raw")), question, CONTEXT)
    assert (whole - split).abs().max() < 1e-5


def test_prefill_of_kept_tokens_is_refused_where_windows_slide(random_lm):
    with pytest.raises(UnsupportedCacheError, match="sliding"):
        prefill(random_lm("mistral-sliding"), random_ids(CONTEXT), KEPT)


def test_generations_over_one_cache_do_not_touch_it(random_lm, architecture):
    lm = random_lm(architecture)
    cache = prefill(lm, random_ids(CONTEXT))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    first, second = view(lm, cache), view(lm, cache)
    assert first.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr(), "a view copies nothing"
    alone = next_logits(lm, first, random_ids(QUESTION, 1), CONTEXT)
    next_logits(lm, second, random_ids(QUESTION, 2), CONTEXT)
    again = next_logits(lm, view(lm, cache), random_ids(QUESTION, 1), CONTEXT)
    assert torch.equal(alone, again)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
