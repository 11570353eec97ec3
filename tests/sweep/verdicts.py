"""What becomes of a context that leaves a model and comes back to it, by recipe, against the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.cache import KVCache
from kvlink.errors import KvlinkError
from kvlink.model.generate import next_logits
from kvlink.model.language import LanguageModel
from kvlink.model.loading import wrap
from kvlink.model.prefill import attention_layers
from kvlink.model.restore import view

TEXT = "Mira Dosh was born in Tavik. Ren Holt was born in Lisket, and works for Gestox Energy. " * 3
QUESTION = "Where was Ren Holt born?"
RECIPES = {
    "raw": ("raw", 1e-6),
    "int8": ("int8", 0.02),
    "pruned": ("q2c@0.5 raw", 1e-4),
    "transform": ("transform=0.001 basis=own", 0.05),
}
"""By column: the recipe, and how far off it may be, root mean square as a share: logits of `raw` and `pruned` from
the model's own, keys and values of `int8` and `transform` from those that left."""
LOSSY = ("int8", "transform")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind`: exact (within the column's bound), refused (by name), wrong, traceback. `words`: what was seen."""

    kind: str
    words: str


@dataclass(frozen=True, slots=True)
class Row:
    """One family: its traits in words, the verdict of each recipe; of one that is refused at load, `load` alone."""

    family: str
    traits: str
    load: Verdict
    by_recipe: dict[str, Verdict]

    @property
    def kinds(self) -> set[str]:
        return {self.load.kind, *(verdict.kind for verdict in self.by_recipe.values())}


def judge(family: str, model: Any, tokenizer: Any) -> Row:
    """Load a model and send a context through every recipe."""
    try:
        lm = wrap(family, model, tokenizer)
    except KvlinkError as error:
        return Row(family, "", Verdict("refused", str(error)), {})
    except Exception as error:  # the kind that must not happen
        return Row(family, "", Verdict("traceback", repr(error)), {})
    return Row(family, _traits(lm), Verdict("exact", ""), {name: _through(lm, name) for name in RECIPES})


def _through(lm: LanguageModel, name: str) -> Verdict:
    recipe, bound = RECIPES[name]
    sender, receiver = Sender(lm), Receiver(lm)
    try:
        context = sender.read(TEXT)
        held = receiver.receive(sender.pack(context, QUESTION, recipe).frames)
        receiver.answer(held, QUESTION, max_new_tokens=3)
        ids, tokens = lm.question_ids(QUESTION, len(context.ids)), len(context.ids)
        found = next_logits(lm, view(lm, held.cache), ids, tokens)
        expected = _oracle(lm, context.cache, held.cache, ids, pruned=name == "pruned")
    except KvlinkError as error:
        return Verdict("refused", str(error))
    except Exception as error:  # the kind that must not happen
        return Verdict("traceback", repr(error))
    off = _distance(held.cache, context.cache) if name in LOSSY else _off(found, expected)
    return Verdict("exact" if off <= bound else "wrong", f"{off:.1g}")


def _off(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of what was expected; nan where a number is none."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-20))


def _distance(found: KVCache, own: KVCache) -> float:
    """The largest `_off` of any layer's keys or values."""
    pairs = zip(found.layers, own.layers, strict=True)
    return max(max(_off(a.keys, b.keys), _off(a.values, b.values)) for a, b in pairs)


def _oracle(lm: LanguageModel, full: KVCache, held: KVCache, ids: list[int], *, pruned: bool) -> Tensor:
    """The logits of the model that never left; where positions are gone, with these masked in full layers."""
    tokens = full.tokens
    if not pruned:
        return next_logits(lm, view(lm, full), ids, tokens)
    seen = torch.zeros(tokens, dtype=torch.bool)
    kept = next((layer for layer in held.layers if not layer.sliding), None)
    seen[torch.arange(tokens) if kept is None else kept.positions[0]] = True
    if not any(layer.sliding for layer in full.layers):
        return next_logits(lm, view(lm, full), ids, tokens, seen)
    with _masked(lm, full, seen, len(ids)):
        return next_logits(lm, view(lm, full), ids, tokens)


@contextmanager
def _masked(lm: LanguageModel, full: KVCache, seen: Tensor, asked: int) -> Iterator[None]:
    """Full-attention layers see a mask that hides positions; those with a sliding window do not."""
    mask = torch.zeros(1, 1, asked, full.tokens + asked)
    mask[..., torch.cat((~seen, torch.zeros(asked, dtype=torch.bool)))] = torch.finfo(torch.float32).min
    mask[0, 0, :, full.tokens :] = torch.full((asked, asked), torch.finfo(torch.float32).min).triu(1)

    def poison(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        if not full.layers[module.layer_idx].sliding:
            named["attention_mask"] = mask
        return arguments, named

    modules = attention_layers(lm.model)
    handles = [module.register_forward_pre_hook(poison, with_kwargs=True) for module in modules]
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(lm.attention)
        for handle in handles:
            handle.remove()


def _traits(lm: LanguageModel) -> str:
    """Heads, how keys turn, windows, and how a pruned cache is restored."""
    traits = lm.traits
    words = [f"{traits.kv_heads} × {traits.head_size}"]
    turning = {a for a in traits.arrangements if a.source}
    words += sorted({a.layout + (" backwards" if a.backwards else "") for a in turning}) or ["not turned"]
    if turning and any(not a.source for a in traits.arrangements):
        words.append("some layers not turned")
    if any(layer.sliding for layer in Sender(lm).read("a b c").cache.layers):
        words.append("sliding")
    if traits.padded:
        words.append("counts keys: restored at full length")
    return ", ".join(words)
