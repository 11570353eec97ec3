"""Generation from a restored cache: the question is read at its own positions, then tokens follow.

The kept part needs no token ids. What looks at token history (repetition penalties, n-gram bans)
is therefore off: the answer is greedy, or sampled from a seed.

Does not know: codecs, peers. Place on the path: last at the receiver; the sender drafts with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlink.cache import KVCache
from kvlink.defaults import NEW_TOKENS
from kvlink.errors import ContextError, DataError
from kvlink.model.detokenize import AnswerText
from kvlink.model.forward import forward
from kvlink.model.language import LanguageModel
from kvlink.model.restore import view


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token: its id, the text that is new, seconds since the start.

    The texts of all steps join to the decoded answer; one that later tokens may change comes later."""

    token_id: int
    text: str
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `first_token_s`: from the start of reading the question."""

    text: str
    token_ids: tuple[int, ...]
    first_token_s: float
    total_s: float


def generate(
    lm: LanguageModel,
    cache: KVCache,
    question: str,
    *,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    visible: Tensor | None = None,
) -> Iterator[Step]:
    """Answer `question` from `cache`, a token at a time. Works on its own view of the cache.

    `temperature` 0 is greedy. `visible` `[T]` bool: positions of a full cache that may be attended
    to, for comparisons with a cache that holds no others. Raises ContextError where the window is too small.
    """
    if max_new_tokens < 1:
        raise ContextError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature <= 10:
        raise ContextError(f"temperature must be from 0 to 10, got {temperature}")
    ids: Sequence[int] = lm.question_ids(question, cache.tokens, max_new_tokens)
    sampler = torch.Generator().manual_seed(seed)
    state, position, began = view(lm, cache), cache.tokens, time.perf_counter()
    ends, written = _stop_ids(lm), AnswerText(lm.tokenizer, lm.template.stops)
    for count in range(1, max_new_tokens + 1):
        logits = next_logits(lm, state, ids, position, visible)[-1]
        position += len(ids)
        token = _pick(logits, temperature, sampler)
        ended = token in ends
        text = "" if ended else written.add(token)
        if ended or (count == max_new_tokens and not written.stopped):
            text += written.finish()
        yield Step(token, text, time.perf_counter() - began)
        if ended or written.stopped:
            return
        ids = [token]


def answer(lm: LanguageModel, cache: KVCache, question: str, **options: Any) -> Answer:
    """The whole answer as text without the space around it. Options as in `generate`."""
    steps = list(generate(lm, cache, question, **options))
    return Answer(
        "".join(step.text for step in steps).strip(),
        tuple(step.token_id for step in steps),
        steps[0].elapsed_s,
        steps[-1].elapsed_s,
    )


def logits_along(
    lm: LanguageModel, cache: KVCache, question: str, answer: Answer, visible: Tensor | None = None
) -> Tensor:
    """Logits `[A, V]` float64 from which each token of `answer` is chosen, each after the ones before it.

    Read in one pass. `visible`: see `generate`. Raises ContextError where the window is too small.
    """
    ids = lm.question_ids(question, cache.tokens, len(answer.token_ids))
    forced = [*ids, *answer.token_ids[:-1]]
    return next_logits(lm, view(lm, cache), forced, cache.tokens, visible)[len(ids) - 1 :].double()


def divergence(own: Tensor, other: Tensor) -> Tensor:
    """KL(own ‖ other) in nats of each token's distribution `[A]`, from log-probabilities `[A, V]`."""
    return (own.exp() * (own - other)).sum(-1).clamp(min=0)


def next_logits(
    lm: LanguageModel, state: object, ids: Sequence[int], position: int, visible: Tensor | None = None
) -> Tensor:
    """Logits `[len(ids), V]` float32 of tokens read at `position …`; fills `state`.

    The mask spans the logical length: sliding-window layers count from it. `visible`: see `generate`.
    """
    visible = getattr(state, "visible", None) if visible is None else visible
    mask = torch.ones(position + len(ids), dtype=torch.long)
    if visible is not None:
        mask[: len(visible)] = visible
    with lm.lock:
        found = forward(lm.model, ids, state, torch.arange(position, position + len(ids)), mask)
    return found.float().cpu()


def _pick(logits: Tensor, temperature: float, sampler: torch.Generator) -> int:
    """The next token. Raises DataError where the numbers of a cache have overflowed in the model."""
    top = logits.max()
    if not bool(top.isfinite()):
        raise DataError("the model's logits are not finite: it cannot use the numbers that its cache holds")
    if temperature == 0:
        return int(logits.argmax())
    # From the top down, so that no temperature is too small: the others' share goes to 0.
    chances = ((logits.double() - top) / temperature).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=sampler))


def _stop_ids(lm: LanguageModel) -> frozenset[int]:
    """The ids that end an answer, from the tokenizer and the generation configuration."""
    found = {lm.tokenizer.eos_token_id}
    configured = getattr(lm.model.generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, list) else {configured}
    return frozenset(i for i in found if i is not None)
