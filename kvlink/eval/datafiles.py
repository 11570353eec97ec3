"""Files of questions as people have them: SQuAD's and TriviaQA's format, the hub's, lines of JSON.

    Found        the questions of a file, and what of it was left out and why
    squad, trivia

Whatever stands where a text belongs is a text, a whole number that is read as its digits, or a reason to
leave the question out. Nothing is left out in silence: `Found.said` counts it and names the first of each
kind by its place in the file. A file with no question left is refused with the same words.

Does not know: models, transfers. Place on the path: before it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from kvlink.errors import ConfigError, ContextError
from kvlink.eval.items import Item, Query
from kvlink.texts import half_character, read_text

MAX_FILE_BYTES = 1_000_000_000
"""Of one file of questions."""
TRIVIA_WORDS = 800
"""Words of an evidence document that are read, as the data set's own conversion cuts them."""
_MAX_EVIDENCE_BYTES = 64_000_000
_MAX_DIGITS = 400
_SHAPE = re.compile(r"""\s*(\{\s*["']|\[\s*["'{\]])""")
"""How an object or a list begins that stands in a text."""


class _OddError(ValueError):
    """What makes a question one that cannot be asked."""


class Found(list[Item]):
    """The questions of a file in its order. `source`: how the file was called."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self._left_out: dict[str, tuple[int, str]] = {}

    def leave_out(self, why: str, where: str) -> None:
        """Count something that is no part of the questions. `where`: its place in the file."""
        count, first = self._left_out.get(why, (0, where))
        self._left_out[why] = count + 1, first

    @property
    def said(self) -> str:
        """One line about what was left out; empty where all was read."""
        if not self._left_out:
            return ""
        told = [f"{count:,} × {why} (first: {first})" for why, (count, first) in self._left_out.items()]
        return f"{self.source}: {len(self):,} questions read; left out: {'; '.join(told)}"

    def required(self, hint: str = "") -> Found:
        """Itself. Raises ContextError where no question is left."""
        if not self:
            why = self.said.partition("; ")[2]
            raise ContextError(f"{self.source} has no answerable question{': ' if why else ''}{why}{hint}")
        return self


def squad(path: Path) -> Found:
    """The answerable questions of a file in SQuAD's format, v1.1 or v2.0.

    The same in other shapes too: entries `{"context", "question", "answers"}`, paragraphs or articles in a
    list, under `data`, or a line each; answers as `[{"text"}]`, `{"text": []}` or strings.
    Unrelated is the paragraph's next question; the files have no paraphrases and name no entities.
    Raises ContextError where the file cannot be read, is not that format, or has no such question.
    """
    found = Found(str(path))
    if _is_hub_name(path):
        entries: Iterable[tuple[str, Any]] = _numbered("entry ", "", _hub(str(path)))
    else:
        entries = _roots(path, _read_json(path), "data", "SQuAD's")
    for where, entry in entries:
        for context, questions in _paragraphs(found, where, entry):
            found += _paragraph(found, context, questions)
    return found.required()


def trivia(path: Path) -> Found:
    """The questions of a TriviaQA `rc` file, each with the first evidence document that is there.

    The documents are looked for where the archive puts them: `evidence/wikipedia` and `evidence/web`
    beside the folder of the file, or of what it is a link to. Their first 800 words are the context.
    Raises ContextError where the file cannot be read, is not that format, or has no evidence.
    """
    found = Found(str(path))
    if _is_hub_name(path):
        return _trivia_items(found, _numbered("entry ", "", _hub(str(path), "rc")), _hub_document).required()
    entries = _roots(path, _read_json(path), "Data", "TriviaQA's")
    homes = dict.fromkeys(p.parent.parent / "evidence" for p in (path.absolute(), path.resolve()))
    looked = " and ".join(map(str, homes))
    found = _trivia_items(found, entries, Evidence(list(homes)).document)
    return found.required(f"; its evidence is looked for under {looked}")


def _trivia_items(
    found: Found, entries: Iterable[tuple[str, Any]], document: Callable[[dict[str, Any]], str]
) -> Found:
    for where, entry in entries:
        try:
            fields = {name.lower(): value for name, value in _object(entry, "an entry").items()}
            answer = _object(fields.get("answer"), "an answer")
            named = {name.lower(): value for name, value in answer.items()}
            golds = _golds(
                found,
                where,
                [named.get("value"), *_list(named.get("aliases")), *_list(named.get("humananswers"))],
            )
            if not golds:
                raise _OddError("a question has no answer")
            question, text = _text(fields.get("question"), "a question"), document(entry)
            found.append(Item(text, question, golds, (), "trivia", rules="trivia"))
        except _OddError as odd:
            found.leave_out(str(odd), _named(where, entry, "QuestionId", "question_id"))
    return found


_Questions = list[tuple[str, Any]]
"""The entries of a paragraph's questions, each with its place in the file."""


def _paragraphs(found: Found, where: str, entry: Any) -> Iterator[tuple[Any, _Questions]]:
    """Contexts with their questions: those of an article, of one paragraph, or of one question."""
    if not isinstance(entry, dict):
        found.leave_out(f"an entry is {_kind(entry)}", where)
    elif isinstance(entry.get("paragraphs"), list):
        for place, paragraph in _numbered(f"{where}.paragraphs[", "]", entry["paragraphs"]):
            if isinstance(paragraph, dict) and isinstance(paragraph.get("qas"), list):
                yield paragraph.get("context"), list(_numbered(f"{place}.qas[", "]", paragraph["qas"]))
            else:
                found.leave_out("a paragraph has no list of questions (qas)", place)
    elif isinstance(entry.get("qas"), list):
        yield entry.get("context"), list(_numbered(f"{where}.qas[", "]", entry["qas"]))
    elif "question" in entry:
        yield entry.get("context"), [(where, entry)]
    else:
        found.leave_out("an entry has neither paragraphs nor qas nor a question", where)


def _paragraph(found: Found, context: Any, questions: _Questions) -> list[Item]:
    """The questions of one paragraph. One that is repeated (same id, same words) is asked once."""
    queries: dict[tuple[str, str], Query] = {}
    for where, entry in questions:
        try:
            _text(context, "a context")
            fields = _object(entry, "a question")
            question = _text(fields.get("question"), "a question")
            golds = () if _impossible(fields) else _golds(found, where, _answers(fields.get("answers")))
            if not golds:
                raise _OddError("a question has no answer")
            key = _name(entry, "id") or where, question
            if key in queries:
                raise _OddError("a question is there twice")
            queries[key] = Query(question, golds)
        except _OddError as odd:
            found.leave_out(str(odd), _named(where, entry, "id"))
    asked = list(queries.values())
    others = [*asked[1:], *asked[:1]] if len(asked) > 1 else [None] * len(asked)
    return [
        Item(_text(context, "a context"), q.question, q.answers, (), "squad", unrelated=other)
        for q, other in zip(asked, others, strict=True)
    ]


def _impossible(fields: dict[str, Any]) -> bool:
    """Whether a question says that it has no answer; tables write it as a word or a digit."""
    found = fields.get("is_impossible")
    words = {"true": True, "1": True, "false": False, "0": False, "": False, "none": False}
    told = words.get(str(found).lower())
    if told is None:
        raise _OddError("is_impossible is neither true nor false")
    return told


def _answers(value: Any) -> list[Any]:
    """The answers of a question, whatever shape they are in.

    A table's cell holds them as text: read where it is JSON; what else looks like a shape is no answer's words.
    """
    if isinstance(value, str) and _SHAPE.match(value):
        try:
            value = _parse(value)
        except (ValueError, RecursionError):
            raise _OddError("answers are a text that looks like an object and is no JSON") from None
    if isinstance(value, dict):
        if "text" not in value:
            raise _OddError("answers have no text")
        return _list(value["text"])
    return [_object(one, "an answer").get("text") if isinstance(one, dict) else one for one in _list(value)]


def _golds(found: Found, where: str, answers: Iterable[Any]) -> tuple[str, ...]:
    """The answers that are texts; the others are counted, empty ones are none."""
    golds: dict[str, None] = {}
    for answer in answers:
        if answer == "":
            continue
        try:
            golds[_text(answer, "an answer")] = None
        except _OddError as odd:
            found.leave_out(str(odd), where)
    return tuple(golds)


def _text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _OddError(f"{what} is {_kind(value)}")
    text = str(value)
    if not text.strip():
        raise _OddError(f"{what} is empty")
    if half_character(text) >= 0:
        raise _OddError(f"{what} has half a character")
    return text


def _list(value: Any) -> list[Any]:
    """A list as it is, nothing as an empty one, anything else as the only one of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _OddError(f"{what} is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """What JSON calls it, with an article."""
    kinds: dict[type, str] = {
        bool: "true or false",
        dict: "an object",
        list: "a list",
        str: "a text",
        int: "a number",
    }
    return (
        "null"
        if value is None
        else kinds.get(type(value), "a number that is none" if value != value else "a number")
    )


def _name(entry: Any, *names: str) -> str:
    """An entry's own id, where it has one."""
    found = next((entry[name] for name in names if name in entry), "") if isinstance(entry, dict) else ""
    return str(found) if isinstance(found, (str, int)) else ""


def _named(where: str, entry: Any, *names: str) -> str:
    name = _name(entry, *names)
    return f"{where}, id {name[:80]!r}" if name else where


def _numbered(before: str, after: str, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Values with their places, counted from 0 as in the file's own path."""
    return ((f"{before}{number}{after}", value) for number, value in enumerate(values))


class _Lines(list[tuple[str, Any]]):
    """The values of a file that has one a line, with the lines' numbers."""


def _roots(path: Path, value: Any, key: str, format_name: str) -> Iterable[tuple[str, Any]]:
    """The outermost entries of a file, with their places. Raises ContextError where it has none."""
    if isinstance(value, _Lines):
        return value
    if isinstance(value, dict) and isinstance(value.get(key), list):
        return _numbered(f"{key}[", "]", value[key])
    if isinstance(value, list) and value:
        return _numbered("[", "]", value)
    if isinstance(value, dict) and {name.lower() for name in value} & {"paragraphs", "qas", "question"}:
        return [("the file", value)]
    held = (
        f"an object of {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else _kind(value)
    )
    raise ContextError(
        f"{path} is not in {format_name} format: expected a list of entries or {key!r}, found {held}"
    )


def _read_json(path: Path) -> Any:
    """A file of JSON, or of one JSON value a line. Raises ContextError, which names the line."""
    text = read_text(path, "the file of questions", MAX_FILE_BYTES)
    if not text.strip():
        raise ContextError(f"{path} is empty")
    try:
        return _parse(text)
    except RecursionError:
        raise ContextError(f"{path} is not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        found = _read_lines(path, text)
        if found is None:
            raise ContextError(f"{path} is not JSON: {error}") from error
        return found


def _read_lines(path: Path, text: str) -> _Lines | None:
    """The values of a file of lines; None where already its first is no JSON."""
    found = _Lines()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removeprefix("\ufeff")  # of files that were put together
        if not line.strip():
            continue
        try:
            found.append((f"line {number}", _parse(line)))
        except (ValueError, RecursionError) as error:
            if not found:
                return None
            raise ContextError(f"{path}, line {number} is not JSON: {error}") from error
    return found


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> float:
    """A number of any length: Python refuses to read very long ones, and no answer has that many digits."""
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


class Evidence:
    """The documents beside a TriviaQA file. `homes`: where they may be; links are followed."""

    def __init__(self, homes: list[Path]) -> None:
        self._homes = homes
        self._folders: dict[Path, dict[str, str]] = {}

    def document(self, entry: Any) -> str:
        """The first words of an entry's first document that is there. Raises _OddError."""
        pages = [("wikipedia", page) for page in _list(entry.get("EntityPages"))]
        pages += [("web", page) for page in _list(entry.get("SearchResults"))]
        for folder, page in pages:
            name = page.get("Filename") if isinstance(page, dict) else None
            for home in self._homes:
                text = self._read(home / folder, name) if isinstance(name, str) else ""
                if text:
                    return text
        raise _OddError("its evidence is not there")

    def _read(self, folder: Path, name: str) -> str:
        """A document's first words; empty where it is not there. No name leads out of the folder."""
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or PurePosixPath(name).is_absolute() or ".." in parts:
            return ""
        file: Path | None = folder
        for part in parts:
            file = self._entry(file, part) if file else None
        if file is None or not os.path.isfile(file):
            return ""
        with contextlib.suppress(ContextError):
            return _first_words(read_text(file, "the evidence", _MAX_EVIDENCE_BYTES))
        return ""

    def _entry(self, folder: Path, name: str) -> Path | None:
        """What is called so in a folder, in whatever normal form of Unicode its name is written there."""
        if half_character(name) >= 0:
            return None
        if name.isascii() or os.path.exists(folder / name):
            return folder / name
        if folder not in self._folders:
            names: list[str] = []
            with contextlib.suppress(OSError):
                names = os.listdir(folder)
            self._folders[folder] = {unicodedata.normalize("NFC", n): n for n in names}
        found = self._folders[folder].get(unicodedata.normalize("NFC", name))
        return folder / found if found else None


def _first_words(text: str) -> str:
    return " ".join(text.split()[:TRIVIA_WORDS])


def _is_hub_name(path: Path) -> bool:
    """`owner/name`, as the hub writes it, and nothing on this disk."""
    return len(path.parts) == 2 and not path.is_absolute() and not path.suffix and not os.path.exists(path)


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


def _hub_document(entry: Any) -> str:
    """The first document in an entry of the hub's form. Raises _OddError."""
    for field, column in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        for text in _list(_object(entry.get(field) or {}, "evidence").get(column)):
            if isinstance(text, str) and text.strip() and half_character(text) < 0:
                return _first_words(text)
    raise _OddError("its evidence is not there")
