"""kvlink/v1 is what proto/ says: regenerated and compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_generated_code_is_current(tmp_path):
    pytest.importorskip("grpc_tools", reason="the development extra brings the generator")
    (tmp_path / "kvlink" / "v1").mkdir(parents=True)
    subprocess.run([sys.executable, str(ROOT / "scripts/generate_proto.py"), str(tmp_path)], check=True)
    fresh = {p.name: p.read_text() for p in (tmp_path / "kvlink" / "v1").iterdir()}
    kept = {p.name: p.read_text() for p in (ROOT / "kvlink" / "v1").iterdir() if p.is_file()}
    assert fresh == kept, "run `make proto`"
