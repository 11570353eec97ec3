"""A question about a context, and what else may be asked of that context.

Does not know: where questions come from. Place on the path: before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shift = Literal["same", "paraphrase", "entity", "unrelated"]
SHIFTS: tuple[Shift, ...] = ("same", "paraphrase", "entity", "unrelated")
"""What the receiver asks, seen from the question that the cache was chosen for: the same, the same
in other words, another fact about the same entity, a fact about another one."""

Rules = Literal["squad", "trivia"]


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
