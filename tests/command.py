"""The command as its users run it: a process, its output, its exit code."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from tests.limits import HANGS_S

CONTEXT = (
    "The harbour lay quiet. Maret Olsun was born in Tavik. Nobody believed the part about the whale. " * 4
)
QUESTION = "Where was Maret Olsun born?"


def free_address() -> str:
    """An address on loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(kind: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """An agent as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvlink", kind, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def listening(process: subprocess.Popen[str]) -> str:
    """The address that an agent says it listens on."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"listens on ([^\s,]+)", line)
    assert match, line + (process.stderr.read() if process.stderr else "")
    return match[1]


def kvlink(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kvlink", *arguments],
        input=stdin,
        capture_output=True,
        timeout=HANGS_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
