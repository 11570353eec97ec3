"""Questions: generated ones are answerable from their passage alone; files are checked."""

from __future__ import annotations

import itertools
import json
import random
import sys
import types
from pathlib import Path

import pytest

from kvlink.errors import ConfigError, ContextError
from kvlink.eval.demo import _shown, choose_items
from kvlink.eval.items import SHIFTS, Query
from kvlink.eval.passages import UNKNOWN, lexicon, make_passage
from kvlink.eval.questions import (
    distractors,
    generated,
    load_items,
    padded,
    prose,
    squad,
    trivia,
)


def test_a_seed_gives_the_same_questions_in_every_process():
    first = list(itertools.islice(generated(3), 5))
    assert first == list(itertools.islice(generated(3), 5))
    assert first != list(itertools.islice(generated(4), 5))


def test_every_answerable_question_has_its_answer_in_one_sentence_with_its_entity():
    rng = random.Random(1)
    for _ in range(40):
        passage = make_passage(rng, 20)
        sentences = passage.text.split(". ")
        for question in passage.questions:
            assert question.paraphrases, "each fact can be asked in at least two ways"
            if question.answerable:
                assert any(question.entity in s and question.answer in s for s in sentences), (
                    question,
                    passage.text,
                )
            else:
                assert question.answer == UNKNOWN


def test_entities_share_relations_so_that_the_relation_alone_does_not_tell():
    rng = random.Random(2)
    shared = 0
    for _ in range(20):
        passage = make_passage(rng, 20)
        forms = [q.text.replace(q.entity, "{e}") for q in passage.questions if q.answerable]
        shared += len(forms) > len(set(forms))
    assert shared >= 18


def test_names_differ():
    names = [*lexicon().first, *lexicon().last, *lexicon().town, *lexicon().firm]
    assert len(names) == len(set(names)) == 800


def test_the_projects_prose_holds_its_answers():
    items = prose()
    assert len(items) == 5
    for item in items:
        assert item.answers[0] in item.context
        assert item.paraphrases


def _file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _squad(*entries: dict) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": "Tavik is a town.", "qas": list(entries)}]}]})


def test_squad_files_of_both_versions_are_read(tmp_path):
    v1 = {"question": "What is Tavik?", "answers": [{"text": "a town"}, {"text": "a town"}]}
    v2 = {"question": "Who?", "answers": [], "is_impossible": True}
    (item,) = squad(_file(tmp_path, _squad(v1, v2)))
    assert item.answers == ("a town",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', "not JSON"),
        (b"\xff\xfez", "not UTF-16"),
        ("[]", "not in SQuAD's format"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "no answerable question"),
        (_squad({"question": "Who?", "answers": [], "is_impossible": True}), "no answerable question"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(ContextError, match=message):
        squad(_file(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ContextError, match="cannot read .*nothing.json"):
        squad(tmp_path / "nothing.json")


def test_shifted_questions_ask_what_their_names_say():
    for item in itertools.islice(generated(5), 60):
        assert all(item.query(shift) is not None for shift in SHIFTS)
        assert item.query("same") == Query(item.question, item.answers)
        assert item.query("paraphrase").answers == item.answers
        assert item.query("paraphrase").question != item.question
        for other in (item.entity, item.unrelated):
            assert other.question not in (item.question, *item.paraphrases)
            assert other.answers[0] in item.context
            assert other.answers[0] != UNKNOWN


def test_another_fact_is_about_the_same_entity_and_an_unrelated_one_is_not():
    rng = random.Random("questions/6")
    for item in itertools.islice(generated(6), 30):
        passages = make_passage(rng, rng.randint(18, 31)).questions
        whole = {q.text: q.entity for q in passages}
        assert whole[item.entity.question] == whole[item.question]
        assert whole[item.unrelated.question] != whole[item.question]
        rng = _after(rng, passages, item)


def _after(rng, passages, item):
    """The generator's state after it has drawn `item` from these questions."""
    from kvlink.eval.passages import Passage
    from kvlink.eval.questions import _query, _shifted

    passage = Passage((), passages)
    whole = [(q, *_shifted(passage, q)) for q in passages]
    whole = [entry for entry in whole if entry[1] and entry[2]] or whole
    _, same, others = rng.choice(whole)
    _query(rng, same), _query(rng, others)
    return rng


QAS = [
    {"question": "Where?", "answers": [{"text": "in Tavik"}, {"text": "Tavik"}]},
    {"question": "Who?", "answers": [], "is_impossible": True},
    {"question": "When?", "answers": [{"text": "1861"}], "is_impossible": False},
]


def test_in_a_squad_file_the_unrelated_question_is_another_of_the_paragraph(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "In Tavik, 1861.", "qas": QAS}]}]}))
    where, when = squad(file)
    assert where.unrelated == Query("When?", ("1861",))
    assert when.unrelated == Query("Where?", ("in Tavik", "Tavik"))
    assert where.query("paraphrase") is None
    assert where.query("entity") is None


def trivia_file(folder: Path, documents: dict[str, str]) -> Path:
    for name, text in documents.items():
        place = folder / "evidence" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    file = folder / "qa" / "wikipedia-dev.json"
    file.parent.mkdir(exist_ok=True)
    entries = [
        {
            "Question": "Which street did Norma Desmond live on?",
            "Answer": {"Value": "Sunset Boulevard", "Aliases": ["Sunset Blvd", "Sunset Boulevard"]},
            "EntityPages": [{"Filename": "Norma.txt"}, {"Filename": "Sunset.txt"}],
        },
        {
            "Question": "Who wrote it?",
            "Answer": {"Value": "Billy Wilder", "Aliases": []},
            "EntityPages": [{"Filename": "../../qa/wikipedia-dev.json"}],
            "SearchResults": [{"Filename": "1/page.txt"}],
        },
        {"Question": "Without evidence?", "Answer": {"Value": "no", "Aliases": []}},
    ]
    file.write_text(json.dumps({"Data": entries, "Domain": "Wikipedia"}))
    return file


def test_a_trivia_file_takes_the_first_evidence_that_is_there(tmp_path):
    file = trivia_file(
        tmp_path, {"wikipedia/Sunset.txt": "Word " * 900, "web/1/page.txt": "Billy Wilder wrote."}
    )
    first, second = trivia(file)
    assert first.answers == ("Sunset Boulevard", "Sunset Blvd")
    assert len(first.context.split()) == 800
    assert second.context == "Billy Wilder wrote.", "a name that leads out of the folder is passed over"
    assert first.rules == second.rules == "trivia"


def test_a_trivia_file_without_its_evidence_says_where_it_looked(tmp_path):
    with pytest.raises(ContextError, match="no answerable question: .*; its evidence is looked for under"):
        trivia(trivia_file(tmp_path, {}))


def test_hub_names_go_through_datasets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    entries = {
        "rajpurkar/squad_v2": [
            {"context": "C", "question": "Q", "answers": {"text": ["a", "a"]}},
            {"context": "C", "question": "R", "answers": {"text": []}},
        ],
        "mandarjoshi/trivia_qa": [
            {
                "question": "Q", "answer": {"value": "a", "aliases": ["b"]},
                "entity_pages": {"wiki_context": []}, "search_results": {"search_context": [" ", "text"]},
            }
        ],
    }  # fmt: skip
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, *_, **__: entries[name]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [item.answers for item in load_items("squad:rajpurkar/squad_v2", 5, 0)] == [("a",)]
    (item,) = load_items("trivia:mandarjoshi/trivia_qa", 5, 0)
    assert (item.context, item.answers) == ("text", ("a", "b"))
    with pytest.raises(ContextError, match="cannot load no/such from the hub"):
        load_items("squad:no/such", 5, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="for a hub name the package datasets is needed"):
        load_items("squad:rajpurkar/squad_v2", 5, 0)


def test_of_a_file_the_seed_draws(tmp_path):
    file = tmp_path / "many.json"
    qas = [{"question": f"Q{i}?", "answers": [{"text": str(i)}]} for i in range(50)]
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "C", "qas": qas}]}]}))
    first = load_items(f"squad:{file}", 10, 1)
    assert first == load_items(str(file), 10, 1)
    assert first != load_items(f"squad:{file}", 10, 2)
    assert len(load_items(f"squad:{file}", 80, 1)) == 50


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ConfigError, "data must be generated"),
        ("hotpot:file.json", ConfigError, "data must be generated"),
        ("generated:x", ConfigError, "whole number as its seed, got 'x'"),
        ("squad:missing.json", ContextError, "cannot read .*missing.json: No such file"),
        ("trivia:missing.json", ContextError, "cannot read .*missing.json: No such file"),
    ],
)
def test_data_that_is_not_there_is_refused_by_name(text, error, message):
    with pytest.raises(error, match=message):
        load_items(text, 3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"paragraphs": [{"context": "C", "qas": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"Data": 3}', "is not in TriviaQA's format"),
        ('{"Data": [{"Answer": {}}]}', "has no answerable question: .*an answer is null"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    file = tmp_path / "damaged.json"
    file.write_text(content)
    with pytest.raises(ContextError, match=message):
        trivia(file)


def test_padding_puts_the_passage_among_others():
    item, *others = itertools.islice(generated(1), 12)
    rest = [other.context for other in others]
    grown = padded(item, rest, lambda text: len(text.split()), 800, seed=3)
    assert 800 <= len(grown.context.split()) < 800 + 400
    assert item.context in grown.context
    assert grown.question == item.question
    assert grown == padded(item, rest, lambda text: len(text.split()), 800, seed=3)
    places = {
        padded(item, rest, lambda t: len(t.split()), 800, seed=s).context.index(item.context)
        for s in range(9)
    }
    assert len(places) > 2, "its place varies"
    assert distractors("generated:1", 5) == distractors("generated:1", 5)
    assert item.context not in distractors("generated:1", 1)
    with pytest.raises(ContextError, match="not enough other passages to pad a context to 100000 tokens"):
        padded(item, rest, lambda text: len(text.split()), 100_000, seed=3)


def test_the_examples_of_the_demo_are_questions_that_have_an_answer():
    items = choose_items("generated", 20, 7)
    assert items[0].answers[0] == UNKNOWN, "the first question has none"
    found = [items[index] for index in _shown(items)]
    assert [item.source for item in found] == ["generated"] * 2 + ["prose"] * 2
    assert all(item.answers[0] != UNKNOWN for item in found)
