"""Questions with their contexts: generated, the project's own prose, a SQuAD or a TriviaQA file.

A question comes with shifted ones where the data has them: what a receiver may ask of a cache that
was chosen for another question.

Does not know: models, transfers. Place on the path: before it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kvlink.errors import ConfigError, ContextError
from kvlink.eval.passages import Passage, Question, make_passage

FACT_COUNTS = (18, 31)
"""Facts in a generated passage: 200 to 600 tokens of the embedded model, 499 times in 500."""

Shift = Literal["same", "paraphrase", "entity", "unrelated"]
SHIFTS: tuple[Shift, ...] = ("same", "paraphrase", "entity", "unrelated")
"""What the receiver asks, seen from the question that the cache was chosen for: the same, the same
in other words, another fact about the same entity, a fact about another one."""

Rules = Literal["squad", "trivia"]

_POOL = 256

TRIVIA_WORDS = 800
"""Words of an evidence document that are read, as the data set's own conversion cuts them."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question and its gold answers."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """A question about a context, its gold answers, and what else may be asked of that context.

    `rules`: whose scorer reads the answers.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()
    source: str = ""
    entity: Query | None = None
    unrelated: Query | None = None
    rules: Rules = "squad"

    def query(self, shift: Shift) -> Query | None:
        """The question of that shift; None where the data has none."""
        if shift == "same":
            return Query(self.question, self.answers)
        if shift == "paraphrase":
            return Query(self.paraphrases[0], self.answers) if self.paraphrases else None
        return self.entity if shift == "entity" else self.unrelated


def load_items(text: str, count: int, seed: int) -> list[Item]:
    """The questions that `text` names: `generated[:SEED]`, `squad:FILE`, `trivia:FILE`.

    A path alone is SQuAD's format. Of a file `count` questions are drawn with `seed`, or all where
    it has fewer. `FILE` may be the name of a data set on the hub where the package `datasets` is
    installed. Raises ConfigError for another kind, ContextError where the file has no question.
    """
    kind, colon, rest = text.partition(":")
    if kind == "generated":
        if colon and not rest.isdecimal():
            raise ConfigError(f"generated takes a whole number as its seed, got {rest!r}")
        return list(itertools.islice(generated(int(rest) if colon else seed), count))
    found = from_file(text)
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


def from_file(text: str) -> list[Item]:
    """All questions of `squad:FILE`, `trivia:FILE` or a path, in the file's order."""
    kind, colon, rest = text.partition(":")
    readers: dict[str, Callable[[Path], list[Item]]] = {"squad": squad, "trivia": trivia}
    if colon and kind in readers and rest:
        return readers[kind](Path(rest))
    if Path(text).is_file() or (Path(text).suffix == ".json" and not colon):
        return squad(Path(text))
    raise ConfigError(f"data must be generated[:SEED], squad:FILE or trivia:FILE, got {text!r}")


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


def squad(path: Path) -> list[Item]:
    """The answerable questions of a SQuAD v1.1 or v2.0 file, in its order.

    Unrelated is the paragraph's next question; the files have no paraphrases and name no entities.
    Raises ContextError where the file cannot be read, is not that format, or has no such question.
    """
    if not path.exists() and _is_hub_name(path):
        return _answerable(path, (_squad_hub(entry) for entry in _hub(str(path))))
    try:
        paragraphs = [p for article in _read_json(path)["data"] for p in article["paragraphs"]]
        found = [item for paragraph in paragraphs for item in _paragraph(paragraph)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ContextError(f"{path} is not in SQuAD's format: {type(error).__name__}: {error}") from error
    return _answerable(path, found)


def _paragraph(paragraph: dict[str, Any]) -> list[Item]:
    queries = []
    for entry in paragraph["qas"]:
        golds = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
        if golds and not entry.get("is_impossible", False):
            queries.append(Query(entry["question"], golds))
    others = [*queries[1:], *queries[:1]] if len(queries) > 1 else [None] * len(queries)
    return [
        Item(paragraph["context"], q.question, q.answers, (), "squad", unrelated=other)
        for q, other in zip(queries, others, strict=True)
    ]


def trivia(path: Path) -> list[Item]:
    """The questions of a TriviaQA `rc` file, each with the first evidence document that is there.

    The documents are looked for where the archive puts them: `evidence/wikipedia` and
    `evidence/web` beside the folder of the file. Their first 800 words are the context.
    Raises ContextError where the file cannot be read, is not that format, or has no evidence.
    """
    if not path.exists() and _is_hub_name(path):
        return _answerable(path, (_trivia_hub(entry) for entry in _hub(str(path), "rc")))
    evidence = path.resolve().parent.parent / "evidence"
    try:
        found = [_trivia(entry, evidence) for entry in _read_json(path)["Data"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ContextError(f"{path} is not in TriviaQA's format: {type(error).__name__}: {error}") from error
    return _answerable(path, found, f"; its evidence is looked for under {evidence}")


def _trivia(entry: dict[str, Any], evidence: Path) -> Item | None:
    answer = entry["Answer"]
    golds = tuple(
        dict.fromkeys([answer["Value"], *answer.get("Aliases", ()), *answer.get("HumanAnswers", ())])
    )
    places = [("wikipedia", page["Filename"]) for page in entry.get("EntityPages", ())]
    places += [("web", page["Filename"]) for page in entry.get("SearchResults", ()) if "Filename" in page]
    for folder, name in places:
        file = (evidence / folder / name).resolve()
        # A name from a data file must not lead out of the evidence folder.
        if file.is_relative_to(evidence) and file.is_file():
            text = _first_words(file.read_text(encoding="utf-8", errors="replace"))
            if text:
                return Item(text, entry["Question"], golds, (), "trivia", rules="trivia")
    return None


def _first_words(text: str) -> str:
    return " ".join(text.split()[:TRIVIA_WORDS])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ContextError(f"{path} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ContextError(f"{path} is not JSON: {error}") from error


def _answerable(
    path: Path, items: Sequence[Item | None] | Iterator[Item | None], hint: str = ""
) -> list[Item]:
    found = [item for item in items if item is not None]
    if not found:
        raise ContextError(f"{path} has no answerable question{hint}")
    return found


def _is_hub_name(path: Path) -> bool:
    """`owner/name`, as the hub writes it, and nothing on this disk."""
    return len(path.parts) == 2 and not path.is_absolute() and not path.suffix


def _hub(name: str, config: str | None = None) -> Any:
    """The validation split of a data set on the hub. Raises ConfigError without `datasets`."""
    try:
        return importlib.import_module("datasets").load_dataset(name, config, split="validation")
    except ImportError as error:
        raise ConfigError(
            f"{name}: no such file, and for a hub name the package datasets is needed"
        ) from error
    except Exception as error:  # the hub's client raises what its layers raise
        raise ContextError(f"cannot load {name} from the hub: {error}") from error


def _squad_hub(entry: dict[str, Any]) -> Item | None:
    golds = tuple(dict.fromkeys(entry["answers"]["text"]))
    return Item(entry["context"], entry["question"], golds, (), "squad") if golds else None


def _trivia_hub(entry: dict[str, Any]) -> Item | None:
    golds = tuple(dict.fromkeys([entry["answer"]["value"], *entry["answer"]["aliases"]]))
    for text in [*entry["entity_pages"]["wiki_context"], *entry["search_results"]["search_context"]]:
        if text.strip():
            return Item(_first_words(text), entry["question"], golds, (), "trivia", rules="trivia")
    return None


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
