"""Texts as people hand them over: files with and without marks of their encoding, arguments, halves of characters.

Does not know: what a text is for. Place on the path: ground floor, over the errors; every reader of text
from a disk or a command line begins here.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import sys
import tomllib
import zlib
from pathlib import Path
from typing import Any

from kvlink.errors import ConfigError, ContextError

MAX_TOML_BYTES = 1_000_000
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_GZIP = b"\x1f\x8b"
_HALF = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> int:
    """Where the first half of a character is that no encoding has, -1 where there is none.

    Such halves come from bytes of an argument that are not UTF-8, and from `\\ud83c` in JSON.
    """
    found = None if text.isascii() else _HALF.search(text)
    return found.start() if found else -1


def whole(text: str, what: str) -> str:
    """`text` where all its characters are whole. Raises ContextError, which names `what`."""
    at = half_character(text)
    if at >= 0:
        found = text[max(0, at - 10) : at + 10]
        raise ContextError(f"{what} is not whole: half a character at {at}, in {found!r}; is it UTF-8?")
    return text


def read_bytes(path: str | Path, what: str, most: int) -> bytes:
    """A file's bytes, unpacked where it is gzip; `-` is standard input.

    Raises ContextError where it cannot be read, or has more than `most` bytes.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(most + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(most + 1)
        if data.startswith(_GZIP):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: a zero byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ContextError(f"cannot read {what} {path}: {reason}") from error
    if len(data) > most:
        raise ContextError(f"{what} {path} has more than {most:,} bytes")
    return data


def read_text(path: str | Path, what: str, most: int) -> str:
    """A text file in UTF-8, or in what the mark at its beginning says. Raises ContextError."""
    data = read_bytes(path, what, most)
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", ""))
    if not mark:
        encoding = json.detect_encoding(data[:4]) if b"\0" in data[:4] else "utf-8"
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ContextError(
            f"{what} {path} is not {encoding.upper()}: byte {data[len(mark) + error.start]:#04x} at "
            f"{len(mark) + error.start}"
        ) from error


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file that people edit. Raises ConfigError where it cannot be read or is none."""
    try:
        return tomllib.loads(read_text(path, what, MAX_TOML_BYTES))
    except ContextError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"cannot read {what} {path}: {told}") from error
