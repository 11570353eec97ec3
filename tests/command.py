"""The command as its users run it: a process, its output, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys

CONTEXT = (
    "The harbour lay quiet. Maret Olsun was born in Tavik. Nobody believed the part about the whale. " * 4
)
QUESTION = "Where was Maret Olsun born?"


def kvlink(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kvlink", *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
