"""What the commands share: input, the console, the log.

Does not know: what a command does. Place on the path: the face of the package.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from kvlink import errors
from kvlink.bounds import TEXT
from kvlink.receipt import warnings_of
from kvlink.terminal import note
from kvlink.texts import read_text

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def read_context(path: str) -> str:
    text = read_text(path, "the context", TEXT.most)
    if not text.strip():
        raise errors.ContextError(f"the context {path} is empty: nothing to read")
    return text


def warn(recipe: str) -> None:
    """Say on standard error what is not known of a transfer with this recipe."""
    for line in warnings_of(recipe):
        note(f"kvlink: warning: {line}")


def is_said(context: Any, parameter: str) -> bool:
    """Whether the command line, the environment or the file says it; else it is the default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def quiet() -> None:
    """Libraries keep their notes to themselves; standard output belongs to the result."""
    import transformers

    transformers.utils.logging.set_verbosity_error()


def set_up_log(level: str, style: str = "text") -> None:
    from kvlink.observe import JsonLines, TextLines

    out = logging.StreamHandler()
    out.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[out])
    # Their notes may show what is none of a log's business.
    for name in ("httpx", "asyncio", "grpc", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def credentials(folder: Path | None, insecure: bool = False) -> Any:
    """The credentials in a folder, or None. Raises ConfigError, CredentialsError."""
    if folder is None:
        return None
    if insecure:
        raise errors.ConfigError(
            "credentials and insecure exclude each other, whether the command line, the environment or the file says so"
        )
    from kvlink.transport.credentials import Credentials

    found = Credentials(folder)
    found.check_valid()
    return found


def open_file(file: Path) -> Any:
    try:
        return file.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise errors.ContextError(f"cannot read {file}: {getattr(error, 'strerror', error)}") from error
