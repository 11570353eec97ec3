"""Small results that are slow to compute, kept in the user's cache directory between runs.

    recall(kind, key) → value or None        remember(kind, key, value)

A value is small JSON. Each one is a file of its own, written beside and renamed, so that processes
that write at once lose nothing; a file that cannot be read, is not what was asked for, or has changed
since (its digest is in it), counts as none. The oldest files go beyond `MAX_FILES` of a kind. A directory
that cannot be written is only slower.

Does not know: what the values mean. Who remembers puts everything that decides the value into the key.
Place on the path: before it.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from kvlink.files import whole_file

Kind = Literal["weights", "sketch", "self-test"]
MAX_FILES = 512
"""Of one kind."""
MAX_BYTES = 1_000_000
"""Of one file; larger values are not kept, larger files not read."""


def cache_dir() -> Path:
    """Where kvlink keeps what is slow to compute: `KVLINK_CACHE_DIR` or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("KVLINK_CACHE_DIR") or os.path.join(home, "kvlink"))


def canonical(value: Any) -> str:
    """JSON text that is the same for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)


def recall(kind: Kind, key: Any) -> Any:
    """What was remembered for `key` (JSON), None where nothing was."""
    try:
        with open(_file(kind, key), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        kept = json.loads(data) if len(data) <= MAX_BYTES else {}
        whole = kept["key"] == canonical(key) and kept["digest"] == _digest(kind, key, kept["value"])
        return kept["value"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remember(kind: Kind, key: Any, value: Any) -> None:
    """Keep `value` (JSON) for `key`. Where it cannot be kept nothing happens."""
    kept = {"key": canonical(key), "digest": _digest(kind, key, value), "value": value}
    data = json.dumps(kept).encode()
    if len(data) > MAX_BYTES:
        return
    file = _file(kind, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(file, mode=0o600, durable=False) as out:
            out.write(data)
        _forget_oldest(file.parent)


def _digest(kind: Kind, key: Any, value: Any) -> str:
    return blake3(canonical([kind, canonical(key), value]).encode()).hexdigest(length=16)


def _file(kind: Kind, key: Any) -> Path:
    return cache_dir() / "remembered" / kind / f"{blake3(canonical(key).encode()).hexdigest(length=16)}.json"


def _forget_oldest(folder: Path) -> None:
    """Remove the oldest files beyond `MAX_FILES`; what another process removes meanwhile is gone."""
    aged = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            aged.append((entry.stat().st_mtime_ns, entry.path))
    for _, path in sorted(aged)[: max(0, len(aged) - MAX_FILES)]:
        with contextlib.suppress(OSError):
            os.unlink(path)
