"""Agents as processes of their own on loopback, started and stopped by whoever measures them.

Does not know: what is asked of them. Place on the path: around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvlink.errors import PeerUnavailableError

START_S = 120.0
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Running:
    """An agent that serves."""

    address: str
    process: asyncio.subprocess.Process

    def resident_bytes(self) -> int:
        """Memory that is resident for the process now; 0 where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def agent(
    kind: str, model: str, options: Sequence[str] = (), listen: str = "127.0.0.1:0"
) -> AsyncIterator[Running]:
    """A sender or receiver process on loopback, once it serves; port 0 picks one."""
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would block the agent
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvlink", kind, "--listen", listen, "--model", model, *options,
            stdout=asyncio.subprocess.PIPE, stderr=log,
            env=_environment(),
        )  # fmt: skip
        try:
            yield Running(await _address(kind, process, log), process)
        finally:
            await _stop(process)


def _environment() -> dict[str, str]:
    """Ours without what speaks to agents that people run: one that is measured is as the measurement says."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("KVLINK_") or n == "KVLINK_CACHE_DIR"}
    return {**kept, "OMP_NUM_THREADS": "1"}


async def _address(kind: str, process: asyncio.subprocess.Process, log: IO[bytes]) -> str:
    """What the agent says it listens on. Raises PeerUnavailableError with its own last words."""
    line = b""
    if process.stdout is not None:
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except TimeoutError:
            raise PeerUnavailableError(f"the {kind} does not serve within {START_S:g} s") from None
    found = re.search(r"listens on ([^\s,]+)", line.decode())
    if found is None:
        log.seek(0)
        raise PeerUnavailableError(
            f"the {kind} did not start: {log.read().decode(errors='replace').strip()[-800:]}"
        )
    return found[1]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask the agent to stop, and make it if it does not."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
