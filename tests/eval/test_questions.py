"""Questions: generated ones are answerable from their passage alone; files are checked."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from kvlink.errors import ContextError
from kvlink.eval.passages import UNKNOWN, lexicon, make_passage
from kvlink.eval.questions import generated, prose, squad


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
        (b"\xff\xfe", "not UTF-8"),
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
