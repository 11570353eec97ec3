"""Files of questions as people have them: read, or refused by name; what is left out is counted and said."""

from __future__ import annotations

import gzip
import json
import os
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlink.errors import InputError
from kvlink.eval.datafiles import squad, trivia
from kvlink.eval.items import Query
from kvlink.eval.questions import load_items

CONTEXT = "Jand Faris was born in Nibo. Jand Faris plays the cello every evening."
CELLO = [{"text": "cello", "answer_start": 50}]


def doc(answers=CELLO, context=CONTEXT, question="What does he play?", **more):
    entry = {"id": "1", "question": question, "answers": answers, **more}
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [entry]}]}]}


def lines(*values, end="\n"):
    return "".join(json.dumps(value) + end for value in values)


def flat(n, answer="cello", **more):
    return {"id": str(n), "context": CONTEXT, "question": f"Q{n}?", "answers": {"text": [answer]}, **more}


PLAIN = json.dumps(doc())
READ = {
    "plain": PLAIN,
    "byte order mark": "\ufeff" + PLAIN,
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16 without its mark": PLAIN.encode("utf-16-le"),
    "UTF-32": PLAIN.encode("utf-32"),
    "gzip": gzip.compress(PLAIN.encode()),
    "ends of lines as on Windows": json.dumps(doc(), indent=1).replace("\n", "\r\n"),
    "a number as answer": json.dumps(doc([{"text": 1861}])),
    "answers as columns": json.dumps(doc({"text": ["cello", "cello"], "answer_start": [1, 2]})),
    "answers as strings": json.dumps(doc(["cello"])),
    "one answer alone": json.dumps(doc("cello")),
    "an empty answer beside another": json.dumps(doc([{"text": ""}, {"text": "cello"}])),
    "lines": lines(flat(1)),
    "lines with blank ones and a mark": "\ufeff\n" + lines(flat(1), end="\r\n\r\n"),
    "lines of paragraphs": lines({"context": CONTEXT, "qas": [{"question": "Q?", "answers": ["cello"]}]}),
    "a line separator inside a line": json.dumps(flat(1, note="a\u2028b\x85c"), ensure_ascii=False) + "\n",
    "lines put together of files with marks": "\ufeff\n\ufeff" + lines(flat(1)),
    "answers as the text of a table's cell": lines(
        flat(1) | {"answers": '{"text": ["cello"], "start": [50]}'}
    ),
    "a list of answers as a cell's text": lines(flat(1) | {"answers": ' [{"text": "cello"}]'}),
    "possible in words": json.dumps(doc(is_impossible="False")),
    "possible in digits": json.dumps(doc(is_impossible=0)),
    "a list of entries": json.dumps([flat(1)]),
    "a list of articles": json.dumps(doc()["data"]),
    "entries under data": json.dumps({"data": [flat(1)]}),
}


def load(tmp_path, content, name="data.json", reader="squad", said=None):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return load_items(f"{reader}:{path}", 10, 1, (said if said is not None else []).append)


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_what_can_be_read_is_read_whole(tmp_path, content):
    said: list[str] = []
    (item,) = load(tmp_path, content, said=said)
    assert item.context == CONTEXT
    assert item.answers in (("cello",), ("1861",))
    assert said == []


TWO = doc()["data"]
LEFT_OUT = {
    "null as answer": (doc([{"text": None}]), "an answer is null", "data[1].paragraphs[0].qas[0]"),
    "true as answer": (doc([{"text": True}]), "an answer is true or false", "data[1]"),
    "NaN as answer": (doc([{"text": float("nan")}]), "an answer is a number that is none", "data[1]"),
    "null as context": (doc(context=None), "a context is null", "data[1].paragraphs[0].qas[0], id '1'"),
    "blank context": (doc(context=" \n"), "a context is empty", "data[1]"),
    "empty question": (doc(question=""), "a question is empty", "id '1'"),
    "a list as question": (doc(question=["a"]), "a question is a list", "id '1'"),
    "no answers": (doc([]), "a question has no answer", "id '1'"),
    "answers null": (doc(None), "a question has no answer", "id '1'"),
    "impossible": (doc(is_impossible=True), "a question has no answer", "id '1'"),
    "neither possible nor not": (
        doc(is_impossible="perhaps"), "is_impossible is neither true nor false", "id '1'",
    ),
    "answers as Python writes them": (
        doc("{'text': array(['cello'], dtype=object)}"), "answers are a text that looks like an object", "id '1'",
    ),
    "answers without text": (doc({"start": [1]}), "answers have no text", "id '1'"),
    "half a character in a context": (doc(context="a \ud83c b"), "a context has half a character", "id '1'"),
    "half a character in an answer": (doc([{"text": "\ud83c"}]), "an answer has half a character", "data[1]"),
    "no object": ({"data": [7]}, "an entry is a number", "data[1]"),
    "no paragraphs": ({"data": [{"title": "t"}]}, "an entry has neither paragraphs nor qas", "data[1]"),
    "paragraphs without questions": (
        {"data": [{"paragraphs": [{"context": CONTEXT}]}]},
        "a paragraph has no list of questions",
        "data[1].paragraphs[0]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("odd", "why", "where"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_cannot_be_asked_is_left_out_counted_and_named(tmp_path, odd, why, where):
    said: list[str] = []
    (item,) = load(tmp_path, json.dumps({"data": TWO + odd["data"]}), said=said)
    assert item.question == "What does he play?"
    (told,) = said
    assert "data.json: 1 questions read; left out: 1 × " in told
    assert f"1 × {why}" in told and where in told.partition("(first: ")[2]


@pytest.mark.parametrize(("odd", "why", "where"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_file_of_nothing_else_is_refused_with_the_same_words(tmp_path, odd, why, where):
    with pytest.raises(InputError, match="has no answerable question") as refusal:
        load(tmp_path, json.dumps(odd))
    assert why in str(refusal.value)
    assert where.replace("data[1]", "data[0]") in str(refusal.value)


REFUSED = {
    "empty": ("", "is empty"),
    "blank": (" \n ", "is empty"),
    "broken": ('{"data": [', "is not JSON"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "a deep line": (lines(flat(1)) + "[" * 200_000, "line 2 is not JSON"),
    "a broken line": (lines(flat(1)) + '{"context": ', "line 2 is not JSON"),
    "a number": ("7", "expected a list of entries or 'data', found a number"),
    "an empty list": ("[]", "expected a list of entries or 'data', found a list"),
    "another object": ('{"model": 1, "vocab": {}}', "found an object of 'model', 'vocab'"),
    "TriviaQA's": ('{"Data": []}', "found an object of 'Data'"),
    "not text": (b"\x80\x81", "is not UTF-8: byte 0x80 at 0"),
    "a broken gzip": (gzip.compress(PLAIN.encode())[:40], "cannot read the file of questions"),
    "half a UTF-16": (PLAIN.encode("utf-16") + b"x", "is not UTF-16-LE"),
}


@pytest.mark.parametrize(("content", "why"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_refused_by_name(tmp_path, content, why):
    with pytest.raises(InputError, match="data.json") as refusal:
        load(tmp_path, content)
    assert why in str(refusal.value)


def test_a_number_of_many_digits_is_no_answer_and_no_trouble(tmp_path):
    content = lines(flat(1), flat(2)).replace('"Q2?"', "9" * 5000)
    said: list[str] = []
    assert len(load(tmp_path, content, said=said)) == 1
    assert "a question is a number (first: line 2, id '2')" in said[0]


def test_places_that_are_no_files_are_refused_by_name(tmp_path):
    for place, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.json", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "x\0", "null"),
    ):
        with pytest.raises(InputError, match=why):
            load_items(f"squad:{place}", 1, 1)
        with pytest.raises(InputError, match=why):
            load_items(f"trivia:{place}", 1, 1)
    with pytest.raises(InputError, match="Is a directory"):
        load_items(str(tmp_path), 1, 1)
    with pytest.raises(InputError, match="seed"):
        load_items("generated:" + "9" * 5000, 1, 1)
    with pytest.raises(InputError, match="seed"):
        load_items("generated:٣", 1, 1)


def test_a_repeated_question_is_asked_once_and_others_of_the_same_id_are_not_repeated(tmp_path):
    paragraph = {
        "context": CONTEXT,
        "qas": [
            {"id": "1", "question": "A?", "answers": ["x"]},
            {"id": "1", "question": "A?", "answers": ["x"]},
            {"id": "1", "question": "B?", "answers": ["y"]},
            {"question": "C?", "answers": ["z"]},
            {"question": "C?", "answers": ["z"]},
        ],
    }
    said: list[str] = []
    found = load(tmp_path, json.dumps([paragraph]), said=said)
    assert [item.question for item in found] == ["A?", "B?", "C?", "C?"]
    assert found[0].unrelated == Query("B?", ("y",))
    assert "1 × a question is there twice (first: [0].qas[1], id '1')" in said[0]


def evidence(tmp_path, name, text="Billy Wilder wrote it."):
    place = tmp_path / "evidence" / "wikipedia" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "qa").mkdir(exist_ok=True)
    return place


def trivial(*names, **more):
    entry = {"Question": "Who?", "QuestionId": "q1", "Answer": {"Value": "Billy Wilder", "Aliases": None}}
    return {**entry, "EntityPages": [{"Filename": name} for name in names], **more}


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_evidence_is_found_in_whatever_normal_form_its_name_is(tmp_path, on_disk, in_file):
    evidence(tmp_path, unicodedata.normalize(on_disk, "Gösta Berlings Säga.txt"))
    name = unicodedata.normalize(in_file, "Gösta Berlings Säga.txt")
    (item,) = load(tmp_path, json.dumps({"Data": [trivial(name)]}), "qa/x.json", "trivia")
    assert item.context == "Billy Wilder wrote it."


def test_links_to_the_file_and_to_the_evidence_are_followed(tmp_path):
    """A data set is often a folder of links into a store."""
    store = evidence(tmp_path / "store", "a.txt").parent
    (tmp_path / "here" / "evidence").mkdir(parents=True)
    (tmp_path / "here" / "qa").mkdir()
    (tmp_path / "here" / "evidence" / "wikipedia").symlink_to(store)
    file = tmp_path / "elsewhere.json"
    file.write_text(json.dumps({"Data": [trivial("a.txt")]}))
    (tmp_path / "here" / "qa" / "x.json").symlink_to(file)
    assert len(trivia(tmp_path / "here" / "qa" / "x.json")) == 1
    beside = tmp_path / "store" / "qa" / "x.json"
    beside.write_text(file.read_text())
    (tmp_path / "link.json").symlink_to(beside)
    assert len(trivia(tmp_path / "link.json")) == 1


@pytest.mark.parametrize(
    "name", ["../../qa/x.json", "/etc/passwd", "", "a\0b", "\ud83c.txt", "x" * 5000, None, 7, "."]
)
def test_a_name_that_is_none_or_leads_out_of_the_evidence_is_passed_over(tmp_path, name):
    evidence(tmp_path, "a.txt")
    said: list[str] = []
    content = json.dumps({"Data": [trivial(name, "a.txt"), trivial(name)]})
    (item,) = load(tmp_path, content, "qa/x.json", "trivia", said)
    assert item.context == "Billy Wilder wrote it."
    assert "1 × its evidence is not there (first: Data[1], id 'q1')" in said[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"Answer": None}, "an answer is null"),
        ({"Answer": {"Value": None}}, "an answer is null"),
        ({"Question": 7.5}, "a question is a number"),
        ({"Question": "\ud83c"}, "a question has half a character"),
        ({"EntityPages": 7}, "its evidence is not there"),
    ],
)
def test_odd_entries_of_trivia_are_left_out(tmp_path, change, why):
    evidence(tmp_path, "a.txt")
    said: list[str] = []
    content = json.dumps({"Data": [trivial("a.txt"), {**trivial("a.txt"), **change}, 7]})
    assert len(load(tmp_path, content, "qa/x.json", "trivia", said)) == 1
    assert why in said[0] and "an entry is a number (first: Data[2])" in said[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["data", "Data", "paragraphs", "qas", "context", "question", "Question", "answers", "text", "id",
             "Answer", "Value", "Aliases", "EntityPages", "SearchResults", "Filename", "is_impossible"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=25,
)  # fmt: skip


CONTENT = (
    st.binary(max_size=80)
    | JSON.map(json.dumps).map(str.encode)
    | st.lists(JSON).map(lambda values: lines(*values).encode())
)


@pytest.mark.parametrize("reader", [squad, trivia], ids=["squad", "trivia"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(content=CONTENT)
def test_any_file_is_questions_or_one_error_of_the_tree(tmp_path, reader, content):
    path = tmp_path / "any.json"
    path.write_bytes(content)
    try:
        found = reader(path)
    except InputError as error:
        found, told = [], str(error)
    assert found or "any.json" in told
    for item in found:
        for text in (item.context, item.question, *item.answers):
            assert text.strip()
            text.encode()


def test_a_file_larger_than_its_bound_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("kvlink.eval.datafiles.MAX_FILE_BYTES", 100)
    for content in (PLAIN, gzip.compress(PLAIN.encode() * 1000)[:100]):
        with pytest.raises(InputError, match="more than 100 bytes|cannot read"):
            load(tmp_path, content)
    with pytest.raises(InputError, match="more than 100 bytes"):
        load_items("squad:/dev/zero", 1, 1)
    assert os.path.exists("/dev/zero")
