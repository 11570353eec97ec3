"""The kept vectors, and the script that made them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kvlink.wire.file import read_frames

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "vectors" / "v1"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "scripts" / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_vectors = _script()


def frames_of(name: str) -> list[bytes]:
    with (FOLDER / f"{name}.kvl").open("rb") as stream:
        return list(read_frames(stream))
