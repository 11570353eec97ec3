"""Words as hostile peers and broken files have them, and what of them must never reach a terminal."""

from __future__ import annotations

import re

HOSTILE = {
    "escapes": "\x1b]0;TAKEN\x07\x1b[2J\x1b[31mred\x1b[0m",
    "one-byte escapes": "\x9b31mred\x9d0;TAKEN\x9c",
    "line ends": "x\nkvlink: all is well\r\n2026-01-01 00:00:00,000 INFO kvlink.receiver transfer complete\x0b\x0c\x85",
    "separators": "x\u2028kvlink: all is well\u2029",
    "backspaces": "good\b\b\b\bevil\x7f\r",
    "nul": "a\0b",
    "bidirectional": "user\u202e\u2066niamod\u2069\u202c \u200e\u200f\u061c",
    "invisible": "a\u200bb\u2060c\ufeffd\u00ade\u180ef\U000e0041",
    "half characters": "half \ud83c of it \udc80\udcff",
    "markup": "[bold red]x[/] [link=http://example.org]y[/link] :smile: \x1b[0m",
    "megabytes": "y" * 3_000_000,
    "megabytes of escapes": "\x1b[2J" * 500_000,
    "megabytes of wide letters": "世" * 1_000_000,
}
"""Strings by what is wrong with them."""

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def obeyed(text: str) -> str:
    """The first thing in `text` that a terminal obeys, turns round, hides or cannot show; or ""."""
    found = _OBEYED.search(text)
    return repr(found[0]) if found else ""
