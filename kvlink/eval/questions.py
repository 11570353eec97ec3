"""Questions with their contexts: generated, the project's own prose, a SQuAD or a TriviaQA file.

A question comes with shifted ones where the data has them: what a receiver may ask of a cache that
was chosen for another question.

Does not know: models, transfers. Place on the path: before it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from kvlink.errors import ConfigError, ContextError
from kvlink.eval.datafiles import Found, squad, trivia
from kvlink.eval.items import Item, Query
from kvlink.eval.passages import Passage, Question, make_passage

FACT_COUNTS = (18, 31)
"""Facts in a generated passage: 200 to 600 tokens of the embedded model, 499 times in 500."""

_POOL = 256
_SEED = re.compile("[0-9]{1,18}")


def load_items(
    text: str, count: int, seed: int, on_left_out: Callable[[str], None] = lambda _: None
) -> list[Item]:
    """The questions that `text` names: `generated[:SEED]`, `squad:FILE`, `trivia:FILE`.

    A path alone is SQuAD's format. Of a file `count` questions are drawn with `seed`, or all where
    it has fewer; `on_left_out` is told in a line what of it could not be read. `FILE` may be the name
    of a data set on the hub where the package `datasets` is installed.
    Raises ConfigError for another kind, ContextError where the file has no question.
    """
    kind, colon, rest = text.partition(":")
    if kind == "generated":
        if colon and not _SEED.fullmatch(rest):
            raise ConfigError(f"generated takes a whole number as its seed, got {rest!r}")
        return list(itertools.islice(generated(int(rest) if colon else seed), count))
    found = from_file(text, on_left_out)
    chosen = sorted(random.Random(f"sample/{seed}").sample(range(len(found)), min(count, len(found))))
    return [found[index] for index in chosen]


def distractors(text: str, seed: int) -> list[str]:
    """Contexts to pad with: of all questions of a file, or of passages that no question is about."""
    if text.partition(":")[0] == "generated":
        rng = random.Random(f"distractors/{seed}")
        return [make_passage(rng, rng.randint(*FACT_COUNTS)).text for _ in range(_POOL)]
    found = list(dict.fromkeys(item.context for item in from_file(text)))
    random.Random(f"distractors/{seed}").shuffle(found)
    return found[:_POOL]


def from_file(text: str, on_left_out: Callable[[str], None] = lambda _: None) -> list[Item]:
    """All questions of `squad:FILE`, `trivia:FILE` or a path, in the file's order."""
    kind, colon, rest = text.partition(":")
    readers: dict[str, Callable[[Path], Found]] = {"squad": squad, "trivia": trivia}
    if colon and kind in readers and rest:
        found = readers[kind](Path(rest))
    elif os.path.exists(text) or (_looks_like_a_file(text) and not colon):
        found = squad(Path(text))
    else:
        raise ConfigError(f"data must be generated[:SEED], squad:FILE or trivia:FILE, got {text!r}")
    if found.said:
        on_left_out(found.said)
    return found


def _looks_like_a_file(text: str) -> bool:
    return text.removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson"))


def generated(seed: int, fact_counts: tuple[int, int] = FACT_COUNTS) -> Iterator[Item]:
    """An endless stream: one question from each of many passages, unanswerable ones included.

    Drawn among the questions that have another fact about their entity and one about another.
    """
    rng = random.Random(f"questions/{seed}")
    while True:
        passage = make_passage(rng, rng.randint(*fact_counts))
        open_questions = [(q, *_shifted(passage, q)) for q in passage.questions]
        whole = [(q, same, others) for q, same, others in open_questions if same and others]
        question, same, others = rng.choice(whole or open_questions)
        yield Item(
            passage.text, question.text, (question.answer,), question.paraphrases, "generated",
            _query(rng, same), _query(rng, others),
        )  # fmt: skip


def _shifted(passage: Passage, question: Question) -> tuple[list[Question], list[Question]]:
    """Answerable questions about other facts: of the same entity, and of others."""
    rest = [q for q in passage.questions if q.answerable and q.fact != question.fact]
    return (
        [q for q in rest if q.entity == question.entity],
        [q for q in rest if question.entity not in (q.entity, q.answer) and q.entity != question.answer],
    )


def _query(rng: random.Random, questions: Sequence[Question]) -> Query | None:
    if not questions:
        return None
    chosen = rng.choice(questions)
    return Query(chosen.text, (chosen.answer,))


def prose() -> list[Item]:
    """Five questions over plain prose written for the project, one per passage."""
    text = resources.files("kvlink.eval").joinpath("prose.json").read_text(encoding="utf-8")
    return [
        Item(x["context"], x["question"], tuple(x["answers"]), tuple(x["paraphrases"]), "prose")
        for x in json.loads(text)
    ]


def padded(
    item: Item, others: Sequence[str], count_tokens: Callable[[str], int], tokens: int, seed: int
) -> Item:
    """`item` with other passages around its own until the context has at least `tokens` tokens.

    Passages and the place of its own are drawn with `seed`. A passage that happens to speak of the
    same entity is not avoided: those of the generator hardly ever do.
    Raises ContextError where the others do not suffice.
    """
    chosen: list[str] = []
    rng = random.Random(f"pad/{seed}")
    have = count_tokens(item.context)
    for text in rng.sample(others, len(others)):
        if have >= tokens:
            break
        if text != item.context:
            chosen.append(text)
            have += count_tokens(text)
    if have < tokens:
        raise ContextError(f"not enough other passages to pad a context to {tokens} tokens, got {have}")
    chosen.insert(rng.randint(0, len(chosen)), item.context)
    return replace(item, context="\n".join(chosen))
