"""The one door to the terminal: whatever a command says passes the gate for foreign words here.

    say, note     one line, on standard output or standard error
    say_text      text that keeps its lines: an answer
    say_json      data
    say_table     rows under titles
    progress      a bar on standard error while that is a terminal

    open_standard_streams   comes first

Words of peers, files, models and arguments go in as they are. Out goes nothing that a terminal obeys,
turns round or cannot show, one value stays on one line, and none is longer than `quoting` lets it be.

Does not know: what is said. Place on the path: the face of the command line.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from kvlink.errors import ConfigError
from kvlink.quoting import LINE, json_text, shown, shown_text

Side = Literal["left", "right"]

_FILE_WIDTH = 170
"""Columns of a table where standard output is no terminal: in a file tables keep their columns."""


def open_standard_streams() -> None:
    """Make /dev/null of each standard stream that was closed (`>&-`), before anything else is opened.

    Else there is none to write to, and the next file or connection that is opened takes its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, descriptor == number)
            mode = "w" if number else "r"
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)


def say(line: object) -> None:
    _put(shown(line, LINE))


def note(line: object) -> None:
    """Beside the result: on standard error."""
    with contextlib.suppress(OSError):  # nobody is left to be told
        print(_encodable(shown(line, LINE), sys.stderr), file=sys.stderr, flush=True)


def say_text(text: str, end: str = "\n") -> None:
    """Text of any length with its lines. `end`: empty where more of it follows."""
    _put(shown_text(text), end)


def say_json(value: Any) -> None:
    """Valid JSON whatever is in it: numbers that are none are null, odd characters are escaped."""
    narrow = not (sys.stdout.encoding or "").lower().startswith("utf")
    _put(json_text(value, indent=2, ascii_only=narrow))


def say_table(
    title: str,
    columns: Sequence[tuple[str, Side]],
    rows: Iterable[Sequence[object]],
    whole: Iterable[str] = (),
) -> None:
    """`rows` under the titles of `columns`. `whole`: columns whose cells are not wrapped."""
    table = Table(
        title=Text(shown(title), style="table.title"), title_justify="left", show_edge=False, pad_edge=False
    )
    unwrapped = frozenset(whole)
    for name, side in columns:
        table.add_column(Text(shown(name)), justify=side, no_wrap=name in unwrapped)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=_FILE_WIDTH)
    with console.capture() as drawn:
        console.print(table)
    _put(drawn.get(), end="")


def _put(text: str, end: str = "\n") -> None:
    """Write to standard output, at once. Raises ConfigError where it cannot be written.

    Who has read enough and closed the pipe (`| head`) ends the command without a word.
    """
    try:
        print(_encodable(text, sys.stdout), end=end, flush=True)
    except OSError as error:
        drop_output()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        raise ConfigError(f"cannot write to standard output: {error.strerror}") from error


def drop_output() -> None:
    """What is left in the buffer would be tried again, and complained about, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _encodable(text: str, out: Any) -> str:
    """`text` with escapes for what the encoding of `out` does not have."""
    encoding = out.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def progress(*columns: ProgressColumn) -> Progress:
    """A bar after a task's title; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    title = TextColumn("{task.description}", markup=False)
    return Progress(title, *columns, console=console, transient=True, disable=not console.is_terminal)
