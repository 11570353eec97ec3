"""Generated passages with questions: facts about made-up people, towns and firms.

Purpose: data that a model cannot answer from memory, so that an answer shows what the
context cache carried. The embedded model is trained on these passages (other seeds), the
demo and the evaluation draw their questions from them.

Does not know: tokenizers, models, caches. Place on the path: before it; feeds `eval` and
the training script.

Every entity shares relations with other entities of its passage, so a reader has to bind a
value to its entity and cannot guess it from the relation alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

UNKNOWN = "unknown"
"""The answer to a question that its passage does not answer."""

_CONSONANTS = "b br c ch d dr f fl g gr h j k kl l m n p pr r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ea ou".split()
_CODAS = ["", "", "", *"n r l s m nd rt x th ck".split()]


@dataclass(frozen=True, slots=True)
class Piece:
    """A span of the passage's text and what it is: `entity`, `value` or plain (`""`)."""

    text: str
    role: str = ""
    fact: int = -1


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a passage; `paraphrases` ask for the same fact in other words."""

    text: str
    answer: str
    paraphrases: tuple[str, ...]
    entity: str
    fact: int
    """Index of the fact that answers it, -1 where none does."""

    @property
    def answerable(self) -> bool:
        return self.fact >= 0


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as its pieces, and the questions that may be asked about it."""

    pieces: tuple[Piece, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class _Relation:
    kind: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Lexicon:
    first: tuple[str, ...]
    last: tuple[str, ...]
    town: tuple[str, ...]
    firm: tuple[str, ...]


_CHOICES: dict[str, tuple[str, ...]] = {
    "colour": tuple("red blue green yellow black white purple silver golden brown grey pink crimson".split()),
    "job": tuple(
        "teacher surgeon pilot painter baker farmer lawyer chemist writer sailor judge nurse "
        "dentist singer miner historian carpenter journalist tailor".split()
    ),
    "animal": tuple("cat dog parrot horse rabbit turtle goat ferret falcon hamster donkey lizard".split()),
    "instrument": tuple("violin piano flute drums guitar cello trumpet harp clarinet".split()),
    "food": tuple("rice bread soup noodles cheese salmon curry pie salad dumplings pancakes olives".split()),
    "product": tuple(
        "clocks ships tractors lamps boots bicycles carpets engines bottles kites cameras bridges".split()
    ),
}
_MONTHS = "January February March April May June July August September October November December".split()
_FIRM_TYPES = "Labs Works Systems Institute Group Energy Foods Press".split()

_RELATIONS: tuple[_Relation, ...] = (
    _Relation("p", "town",
        ("{e} was born in {v}.", "{e} comes from the town of {v}, where the river bends.",
         "{e} was born in the small town of {v} during a long winter."),
        ("Where was {e} born?", "In which town was {e} born?", "Which town does {e} come from?")),
    _Relation("p", "firm",
        ("{e} works for {v}.", "{e} has been employed by {v} for several years.",
         "{e} left an earlier post and now works for {v}."),
        ("Which company does {e} work for?", "Who employs {e}?", "For whom does {e} work?")),
    _Relation("p", "job",
        ("{e} is a {v} by training.", "{e} is known to the neighbours as a skilled {v}.",
         "{e} earns a living as a {v}."),
        ("What is the profession of {e}?", "What job does {e} have?", "What does {e} do for a living?")),
    _Relation("p", "person",
        ("{e} is married to {v}.", "{e} married {v} at a small ceremony.",
         "{e} has been the spouse of {v} since that summer."),
        ("Who is {e} married to?", "Who is the spouse of {e}?", "Whom did {e} marry?")),
    _Relation("p", "animal",
        ("{e} keeps a {v} at home.", "{e} owns a {v} that sleeps by the stove.",
         "{e} walks with a pet {v} every morning."),
        ("What pet does {e} keep?", "Which animal does {e} own?", "What kind of pet does {e} have?")),
    _Relation("p", "instrument",
        ("{e} plays the {v} every evening.", "{e} learned the {v} as a child.",
         "{e} performs on the {v} at weekends."),
        ("What instrument does {e} play?", "Which instrument did {e} learn?")),
    _Relation("p", "date",
        ("{e} celebrates a birthday on {v}.", "{e} has a birthday that falls on {v}."),
        ("When is the birthday of {e}?", "On what day does {e} celebrate a birthday?")),
    _Relation("p", "food",
        ("{e} likes {v} more than anything else.", "{e} has one favourite dish, which is {v}.",
         "{e} cooks {v} for every guest."),
        ("What does {e} like to eat?", "What is the favourite dish of {e}?")),
    _Relation("f", "year",
        ("{e} was founded in {v}.", "{e} opened its doors in {v} with a small team.",
         "{e} has existed since {v}."),
        ("When was {e} founded?", "In what year did {e} open its doors?")),
    _Relation("f", "person",
        ("{e} is led by {v}.", "{e} appointed {v} as its director.",
         "{e} has a new head, who is {v}."),
        ("Who leads {e}?", "Who is the director of {e}?", "Who is the head of {e}?")),
    _Relation("f", "number",
        ("{e} employs {v} people.", "{e} has a staff of {v} after the merger.",
         "{e} pays wages to {v} workers."),
        ("How many people work at {e}?", "How large is the staff of {e}?")),
    _Relation("f", "town",
        ("{e} has its headquarters in {v}.", "{e} is based in {v} and serves the whole region.",
         "{e} moved its main office to {v}."),
        ("Where is {e} based?", "In which town is the main office of {e}?",
         "Where are the headquarters of {e}?")),
    _Relation("f", "colour",
        ("{e} has a {v} logo.", "{e} paints all of its trucks {v}.",
         "{e} chose {v} as the colour of its flag."),
        ("What colour is the logo of {e}?", "Which colour did {e} choose?")),
    _Relation("f", "product",
        ("{e} makes {v} for the export market.", "{e} is best known for its {v}.",
         "{e} has always built {v}."),
        ("What does {e} make?", "What is {e} best known for?")),
    _Relation("t", "number",
        ("{e} has a population of {v}.", "{e} is home to {v} families.",
         "{e} counted {v} residents in the last census."),
        ("What is the population of {e}?", "How many residents does {e} have?")),
    _Relation("t", "person",
        ("{e} has a mayor called {v}.", "{e} elected {v} as its mayor.",
         "{e} is governed by {v} these days."),
        ("Who is the mayor of {e}?", "Who governs {e}?")),
    _Relation("t", "year",
        ("{e} built its stone bridge in {v}.", "{e} has had a bridge since {v}."),
        ("When was the bridge in {e} built?", "In what year did {e} build its bridge?")),
    _Relation("t", "food",
        ("{e} is famous for its {v}.", "{e} draws many visitors with its {v}.",
         "{e} serves {v} at the yearly fair."),
        ("What is {e} famous for?", "What food is served at the fair in {e}?")),
    _Relation("t", "town",
        ("{e} lies to the north of {v}.", "{e} is joined by a narrow road to {v}.",
         "{e} sits upstream of {v} on the same river."),
        ("Which town lies south of {e}?", "Which town is joined to {e} by a road?")),
)  # fmt: skip

_FILLERS = (
    "The weather that week was calm and mild.",
    "Nobody in the room said anything for a while.",
    "Most of the older records were lost in a fire.",
    "The committee will meet again next month to settle the matter.",
    "Local papers reported on the affair at length.",
    "It rained for three days without a pause.",
    "Some of these details are still disputed by those who were there.",
    "The old maps do not agree on this point.",
    "A longer account appears in the appendix.",
    "Many people stop here on their way to the coast.",
    "The road was closed for most of the winter.",
    "Later reports confirmed what had been said before.",
    "Both sides signed the letter and went home.",
    "There was music in the square until late at night.",
    "A second bell was added to the tower after the storm.",
    "Few of them had expected the harvest to be so good.",
    "The train was late again and the platform was full.",
    "An old photograph of the harbour hangs in the hall.",
    "Prices rose slowly and then fell again before the spring.",
    "What happened next is told in many different ways.",
)


def make_name(rng: random.Random, syllables: int) -> str:
    """A pronounceable made-up name of `syllables` syllables, capitalised."""
    stem = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))
    return (stem + rng.choice(_CODAS)).capitalize()


@cache
def lexicon() -> _Lexicon:
    """The fixed name lists (the same in every process): the tokenizer knows them well."""
    rng = random.Random(7)
    seen: set[str] = set()

    def take(count: int, low: int, high: int) -> tuple[str, ...]:
        names: list[str] = []
        while len(names) < count:
            name = make_name(rng, rng.randint(low, high))
            if name not in seen and 3 <= len(name) <= 8:
                seen.add(name)
                names.append(name)
        return tuple(names)

    return _Lexicon(take(160, 1, 2), take(240, 2, 2), take(200, 2, 3), take(200, 2, 2))


class _Names:
    """Draws names; a share of them is new to every reader, not from the lexicon."""

    def __init__(self, rng: random.Random, novel_share: float) -> None:
        self._rng = rng
        self._novel_share = novel_share

    def _pick(self, known: tuple[str, ...]) -> str:
        if self._rng.random() < self._novel_share:
            return make_name(self._rng, 2)
        return self._rng.choice(known)

    def town(self) -> str:
        return self._pick(lexicon().town)

    def person(self) -> str:
        return f"{self._pick(lexicon().first)} {self._pick(lexicon().last)}"

    def firm(self) -> str:
        return f"{self._pick(lexicon().firm)} {self._rng.choice(_FIRM_TYPES)}"

    def entity(self, kind: str) -> str:
        return {"p": self.person, "f": self.firm, "t": self.town}[kind]()

    def value(self, kind: str) -> str:
        rng = self._rng
        special: dict[str, Callable[[], str]] = {
            "town": self.town,
            "person": self.person,
            "firm": self.firm,
            "year": lambda: str(rng.randint(1800, 2024)),
            "number": lambda: str(rng.choice([rng.randint(20, 99), rng.randint(100, 999)])),
            "date": lambda: f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}",
        }
        return special[kind]() if kind in special else rng.choice(_CHOICES[kind])


def _sentence(template: str, entity: str, value: str, fact: int) -> list[Piece]:
    """The pieces of a statement; names carry the space before them."""
    before, after = template.removeprefix("{e}").split("{v}")
    return [
        Piece(" " + entity, "entity", fact),
        Piece(before.rstrip(" ")),
        Piece(" " + value, "value", fact),
        Piece(after),
    ]


def _questions(relation: _Relation, entity: str, answer: str, fact: int, rng: random.Random) -> Question:
    forms = [form.format(e=entity) for form in relation.questions]
    rng.shuffle(forms)
    return Question(forms[0], answer, tuple(forms[1:]), entity, fact)


def make_passage(
    rng: random.Random,
    fact_count: int,
    *,
    filler_share: float = 0.3,
    novel_share: float = 0.15,
    unanswerable_share: float = 0.1,
) -> Passage:
    """A passage of `fact_count` facts in random order, with a question for each.

    `filler_share`: chance of a filler sentence after a fact. `novel_share`: chance that a name
    is made up on the spot. `unanswerable_share`: questions without an answer, per answerable one.
    Two or more entities of a kind share the relations that are used.
    """
    names = _Names(rng, novel_share)
    kinds = rng.sample("pft", rng.choice([1, 1, 2, 3]) if fact_count > 6 else 1)
    relations: dict[str, list[int]] = {}
    for kind in kinds:
        pool = [index for index, relation in enumerate(_RELATIONS) if relation.kind == kind]
        relations[kind] = rng.sample(pool, min(len(pool), rng.randint(2, 5)))
    slots: list[tuple[str, str, int]] = []
    used: set[str] = set()
    while len(slots) < fact_count * 1.3 + 1:
        kind = rng.choice(kinds)
        entity = names.entity(kind)
        if entity not in used:
            used.add(entity)
            slots += [(kind, entity, index) for index in relations[kind]]
    rng.shuffle(slots)
    pieces: list[Piece] = []
    questions: list[Question] = []
    for fact, (_, entity, index) in enumerate(slots[:fact_count]):
        relation = _RELATIONS[index]
        value = names.value(relation.value)
        pieces += _sentence(rng.choice(relation.statements), entity, value, fact)
        questions.append(_questions(relation, entity, value, fact, rng))
        while rng.random() < filler_share:
            pieces.append(Piece(" " + rng.choice(_FILLERS)))
    for _, entity, index in slots[fact_count:]:
        if rng.random() < unanswerable_share * fact_count / (len(slots) - fact_count):
            questions.append(_questions(_RELATIONS[index], entity, UNKNOWN, -1, rng))
    rng.shuffle(questions)
    first = pieces[0]
    pieces[0] = Piece(first.text.removeprefix(" "), first.role, first.fact)
    return Passage(tuple(pieces), tuple(questions))
