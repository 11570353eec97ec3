"""Foreign words on a terminal and in a log: nothing in them is obeyed, made up, hidden or without end."""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink import errors
from kvlink.observe import JsonLines, TextLines
from kvlink.quoting import LINE, VALUE, json_text, shown, shown_text
from kvlink.transport.status import to_status
from tests.hostile import HOSTILE, obeyed

_OVERHEAD = 60
"""Characters that say how much was left out."""

ANY = st.text(st.characters(codec=None), max_size=400)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_value_is_one_visible_bounded_line(text):
    assert obeyed(shown(text)) == ""
    assert "\n" not in shown(text)
    assert len(shown(text)) <= VALUE + _OVERHEAD
    shown(text).encode("utf-8")
    assert obeyed(shown_text(text)) == ""
    shown_text(text).encode("utf-8")


@given(ANY, st.integers(40, 300))
def test_whatever_is_shown_is_one_line_and_within_its_bound(text, most):
    quoted = shown(text, most)
    assert obeyed(quoted) == ""
    assert quoted.splitlines() in ([quoted], [])
    assert len(quoted) <= most + _OVERHEAD
    assert shown(quoted, 10_000) == quoted, "quoted once is quoted for ever"


@given(ANY)
def test_text_of_many_lines_loses_nothing_but_what_is_obeyed(text):
    quoted = shown_text(text)
    assert obeyed(quoted) == ""
    harmless = "".join(c for c in text.replace("\r\n", "\n") if not obeyed(c))
    assert re.sub(r"\\(x..|u....|U.{8}|r)", "", quoted) == re.sub(r"\\(x..|u....|U.{8}|r)", "", harmless)


@pytest.mark.parametrize(
    "text",
    [
        "Grüße, 世界",
        "a b",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते",
        "🎻",
        "é as two: e\u0301",
        "wide\u3000space",
        "half\xa0space",
    ],
)
def test_letters_of_any_script_are_shown_as_they_are(text):
    assert shown(text) == text
    assert shown_text(text) == text


def test_an_answer_keeps_its_lines_and_joiners():
    text = "first\n\tsecond می\u200cخواهم 👩\u200d🔬\n"
    assert shown_text(text) == text
    assert shown(text) == "first\\n\\tsecond می\\u200cخواهم 👩\\u200d🔬\\n"


def test_what_is_cut_is_counted():
    quoted = shown("a" * 1000 + "b" * 1000, 100)
    assert quoted == "a" * 75 + " … (1,900 characters left out) … " + "b" * 25
    assert shown("\x1b" * 1000, 100).startswith("\\x1b" * 18 + " … (")
    assert shown(10**10_000) == "a int too large to be written"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | ANY,
        lambda inner: st.lists(inner) | st.dictionaries(ANY, inner),
    )
)
def test_json_reads_back_as_what_it_was_and_obeys_nothing(value):
    def finite(item):
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        if isinstance(item, list):
            return [finite(x) for x in item]
        return {k: finite(v) for k, v in item.items()} if isinstance(item, dict) else item

    def refuse(name):
        raise AssertionError(name)

    for ascii_only in (False, True):
        text = json_text(value, 2, ascii_only=ascii_only)
        assert obeyed(text) == ""
        assert json.loads(text, parse_constant=refuse) == finite(value)
        text.encode("ascii" if ascii_only else "utf-8")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_error_is_one_visible_line_of_bounded_length_here_and_at_the_peer(text):
    for name, cls in vars(errors).items():
        if not (isinstance(cls, type) and issubclass(cls, errors.KvlinkError)):
            continue
        error = cls(f"expected peace, got {text}: what stands at the end is kept")
        assert obeyed(str(error)) == "", name
        assert "\n" not in str(error)
        assert len(str(error)) <= LINE + _OVERHEAD
        assert str(error).startswith("expected peace, got ")
        assert str(error).endswith(": what stands at the end is kept")
        status = to_status(error)
        encoded = "".join(
            c if " " <= c <= "~" and c != "%" else "%00" * len(c.encode()) for c in status.details
        )
        metadata = len(encoded) + sum(len(value) * 4 / 3 for _, value in status.trailing_metadata)
        assert metadata < 8000, "gRPC drops a call whose metadata is larger"


def test_a_short_error_is_left_alone():
    assert str(errors.ContextError("naïve, got 'é'")) == "naïve, got 'é'"


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()], ids=["text", "json"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_record_of_the_log_is_one_line_of_bounded_length(formatter, text):
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        caught = (type(error), error, error.__traceback__)
    record = logging.makeLogRecord(
        {
            "name": "kvlink.receiver",
            "levelname": "INFO",
            "msg": "refused: %s",
            "args": (text,),
            "exc_info": caught,
            "transfer": text,
        }
    )
    line = formatter.format(record)
    assert obeyed(line) == ""
    assert "\n" not in line
    assert len(line.encode()) < 40_000
    assert "refused: " in line
    assert "RuntimeError" in line
    assert "test_quoting" in line, "the place of the error is there"


def test_the_hostile_table_is_hostile():
    kinds = {unicodedata.category(c) for text in HOSTILE.values() for c in text}
    assert {"Cc", "Cf", "Cs", "Zl", "Zp"} <= kinds
    assert all(obeyed(text) or len(text) > 10_000 or "\n" in text for text in HOSTILE.values())
