"""Questions with their contexts: generated, the project's own prose, or a SQuAD file.

Does not know: models, transfers. Place on the path: before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvlink.errors import ContextError
from kvlink.eval.passages import make_passage

FACT_COUNTS = (18, 31)
"""Facts in a generated passage: 200 to 600 tokens of the embedded model, 499 times in 500."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question about a context, its gold answers, and other wordings of it."""

    context: str
    question: str
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()
    source: str = ""


def generated(seed: int, fact_counts: tuple[int, int] = FACT_COUNTS) -> Iterator[Item]:
    """An endless stream: one question from each of many passages, unanswerable ones included."""
    rng = random.Random(f"questions/{seed}")
    while True:
        passage = make_passage(rng, rng.randint(*fact_counts))
        question = rng.choice(passage.questions)
        yield Item(passage.text, question.text, (question.answer,), question.paraphrases, "generated")


def prose() -> list[Item]:
    """Five questions over plain prose written for the project, one per passage."""
    text = resources.files("kvlink.eval").joinpath("prose.json").read_text(encoding="utf-8")
    return [
        Item(x["context"], x["question"], tuple(x["answers"]), tuple(x["paraphrases"]), "prose")
        for x in json.loads(text)
    ]


def squad(path: Path) -> list[Item]:
    """The answerable questions of a SQuAD v1.1 or v2.0 file, in its order.

    Raises ContextError where the file cannot be read, is not that format, or has no such question.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ContextError(f"{path} is not UTF-8: {error}") from error
    except ValueError as error:
        raise ContextError(f"{path} is not JSON: {error}") from error
    try:
        items = [item for article in data["data"] for p in article["paragraphs"] for item in _paragraph(p)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ContextError(f"{path} is not in SQuAD's format: {type(error).__name__}: {error}") from error
    if not items:
        raise ContextError(f"{path} has no answerable question")
    return items


def _paragraph(paragraph: dict[str, Any]) -> Iterator[Item]:
    for entry in paragraph["qas"]:
        golds = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
        if golds and not entry.get("is_impossible", False):
            yield Item(paragraph["context"], entry["question"], golds, (), "squad")
