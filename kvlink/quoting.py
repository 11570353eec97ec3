"""Words that came from elsewhere, made fit for a terminal, a log and an error message.

A peer, a file, a model or an argument can hold escape sequences that a terminal obeys, line ends that
make up lines of a log, marks that turn the order of letters round, letters that nobody sees, halves of
characters that cannot be encoded, and megabytes. Whatever of it is printed or logged passes here first.

    shown        one line, bounded: names, ids, reasons
    shown_text   many lines in any script, unbounded: an answer, a context
    json_text    JSON that reads back as the same value and holds nothing that a terminal obeys

Does not know: where words come from or go to. Place on the path: ground floor, under the errors.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

VALUE, LINE = 200, 1500
"""Characters of one value, and of one whole line, that are shown."""

_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Marks and letters that leave no ink though their category does not say so."""

_KEPT_IN_TEXT = frozenset("\n\t\u00ad\u200c\u200d")
"""What text of many scripts needs: line ends, tabs, the soft hyphen, and the two joiners of letters."""

_ESCAPED_IN_TEXT = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def shown(text: object, most: int = VALUE) -> str:
    """`text` as one line of about `most` characters.

    What is not printable or not visible is written as its escape (`\\n`, `\\x1b`, `\\u202e`). Of what is
    longer the beginning and the end are kept, and how much was left out between them is said. Quoting
    what was quoted before changes nothing.
    """
    found = text if isinstance(text, str) else _plain(text)
    if len(found) <= most:
        quoted = _quote(found)
        if len(quoted) <= most:
            return quoted
    tail = most // 4
    before, after = _head(found, most - tail), _head(found[: -tail - 1 : -1], tail)[::-1]
    left_out = len(found) - len(before) - len(after)
    return f"{_quote(before)} … ({left_out:,} characters left out) … {_quote(after)}"


def shown_text(text: str) -> str:
    """`text` with its lines and letters as they are; what a terminal obeys, turns round or cannot encode
    is written as its escape."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_escape(c) if _obeyed(c) else c for c in text.replace("\r\n", "\n"))


def json_text(value: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """`value` as JSON: what is not printable is escaped, numbers that are not finite are null.

    What JSON does not know (a path, bytes) is written as its text, `shown`. A reader gets the same
    strings, halves of characters too.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False, default=shown)
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or _visible(c) else _json_escape(c) for c in text)


def _plain(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a whole number of more digits than Python is willing to write
        return f"a {type(value).__name__} too large to be written"


def _quote(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _visible(c) else _escape(c) for c in text)


def _head(text: str, most: int) -> str:
    """The beginning of `text` that is at most `most` characters long once it is quoted."""
    room = most
    for index, c in enumerate(text[:most]):
        room -= 1 if _visible(c) else len(_escape(c))
        if room < 0:
            return text[:index]
    return text[:most]


def _visible(c: str) -> bool:
    return (c.isprintable() and not _INVISIBLE.match(c)) or unicodedata.category(c) == "Zs"


def _obeyed(c: str) -> bool:
    return c not in _KEPT_IN_TEXT and unicodedata.category(c) in _ESCAPED_IN_TEXT


def _escape(c: str) -> str:
    return c if _visible(c) else c.encode("unicode_escape", "surrogatepass").decode()


def _json_escape(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x80 else json.dumps(c)[1:-1]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k if isinstance(k, str) else shown(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
