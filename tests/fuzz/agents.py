"""Both agents as processes on loopback, over TLS, with peers of every right and one of the least."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grpc

from kvlink.bounds import MESSAGE
from kvlink.transport import certs
from kvlink.transport.certs import Member
from kvlink.transport.credentials import RIGHTS, Credentials
from tests.command import free_address, listening

KINDS = ("receiver", "sender")
ALL = ("anna", "bert", "carl")
"""Peers with every right."""
LEAST = "dora"
"""A peer that may look, and nothing else."""
HONEST = "ella"
"""Makes no mistakes, and has to be answered all the time."""
LIAR = "liar"
"""A receiver that the sender may dial, and that answers anything."""
NOBODY = "127.0.0.1:9"
"""A receiver that the sender may dial, where nobody listens."""
STOP_S = 60.0
OPTIONS = {
    "receiver": (
        "--max-held", "100MB", "--max-cache", "20MB", "--cache-lifetime-s", "60", "--unused-s", "3",
        "--resume-lifetime-s", "3", "--wait-s", "3",
    ),
    "sender": ("--max-held", "100MB", "--resume-lifetime-s", "3", "--wait-s", "3"),
}  # fmt: skip
"""Bounds that a run of minutes reaches, so that memory has its ceiling early."""


@dataclass(slots=True)
class Agent:
    """One agent process; `metrics`: where it shows them. `resident`: (seconds since the start, bytes);
    `held`: the same for what it says it holds (caches, contexts, packed transfers)."""

    kind: str
    address: str
    metrics: str
    process: subprocess.Popen[str]
    log: IO[bytes]
    resident: list[tuple[float, int]] = field(default_factory=list)
    held: list[tuple[float, int]] = field(default_factory=list)

    def watch(self, at_s: float) -> None:
        """Read the memory that is resident now."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return
        self.resident.append((at_s, pages * os.sysconf("SC_PAGE_SIZE")))

    def ask_held(self, at_s: float) -> None:
        """Ask for the bytes that it says it holds; blocks until they are here."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=STOP_S) as reply:
            lines = reply.read().decode().splitlines()
        found = [
            line.split() for line in lines if line.startswith(("kvlink_held_bytes ", "kvlink_packed_bytes "))
        ]
        self.held.append((at_s, sum(int(float(value)) for _, value in found)))

    def said(self) -> str:
        """Its standard error so far."""
        self.log.flush()
        return Path(self.log.name).read_bytes().decode(errors="replace")

    def stop(self) -> str:
        """SIGTERM; what was wrong about the end, or ""."""
        if self.process.poll() is not None:
            return f"the {self.kind} had ended with code {self.process.returncode}"
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"the {self.kind} did not end within {STOP_S:g} s of SIGTERM"
        return f"the {self.kind} ended with code {code}" if code else ""


@dataclass(frozen=True, slots=True)
class Network:
    """Two agents and the folders of the peers that call them."""

    folder: Path
    agents: dict[str, Agent]
    liar_at: str

    def credentials(self, name: str) -> Credentials:
        return Credentials(self.folder / name)

    def channel(self, peer: str, kind: str) -> grpc.aio.Channel:
        """A connection of its own, which checks nothing of what it sends."""
        address, found = self.agents[kind].address, self.credentials(peer)
        options = [
            ("grpc.ssl_target_name_override", kind),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MESSAGE.most),
            ("grpc.enable_retries", 0),
        ]
        return grpc.aio.secure_channel(address, found.channel(), options=options)

    def token(self, peer: str, kind: str) -> str:
        return self.credentials(peer).dial(self.agents[kind].address).token

    def watch(self, at_s: float) -> None:
        for one in self.agents.values():
            one.watch(at_s)

    def stop(self) -> list[str]:
        """End both agents; what was wrong about it."""
        return [trouble for one in self.agents.values() if (trouble := one.stop())]


def start(folder: Path) -> Network:
    """Make credentials in `folder`, and start both agents with the embedded model."""
    addresses = {kind: free_address() for kind in KINDS}
    at = folder / "network"
    members = [Member(kind, kind, address) for kind, address in addresses.items()]  # type: ignore[arg-type]
    liar_at = free_address()
    members += [Member("nobody", "receiver", NOBODY), Member(LIAR, "receiver", liar_at)]
    certs.begin(at, [*members, *(Member(name, "client") for name in (*ALL, LEAST, HONEST))])
    every = sorted({right for rights in RIGHTS.values() for right in rights})
    for kind in KINDS:
        for name in (*ALL, HONEST):
            _let(at / kind, name, every)
        _let(at / kind, LEAST, ["look"])
    agents = {
        kind: begin(
            kind, addresses[kind], folder / f"{kind}.log", "--credentials", str(at / kind), *OPTIONS[kind]
        )
        for kind in KINDS
    }
    try:
        for one in agents.values():
            listening(one.process)
    except BaseException:
        for one in agents.values():
            one.process.kill()
            one.process.wait()
        raise
    return Network(at, agents, liar_at)


def quarters_bytes(watched: list[tuple[float, int]]) -> list[int]:
    """Medians of the four quarters of the time that was watched."""
    last = watched[-1][0] if watched else 0.0
    quarters = [[b for at, b in watched if q * last / 4 <= at <= (q + 1) * last / 4] for q in range(4)]
    return [int(statistics.median(found)) if found else 0 for found in quarters]


def _let(folder: Path, name: str, rights: list[str]) -> None:
    """What a peer may do at an agent."""
    path = folder / certs.PEERS
    head, mark, rest = path.read_text().partition(f'[access."{name}"]')
    lines = rest.split("\n")
    at = next(number for number, line in enumerate(lines) if line.startswith("may"))
    lines[at] = "may = [" + ", ".join(f'"{right}"' for right in rights) + "]"
    path.write_text(head + mark + "\n".join(lines))


def begin(kind: str, address: str, log: Path, *options: str) -> Agent:
    """Start an agent with the embedded model, and do not wait until it listens. `log`: for its standard error."""
    out = log.open("wb")
    metrics = free_address()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "kvlink", kind, "--listen", address, "--metrics", metrics, "--log-level", "info",
            *options,
        ],
        stdout=subprocess.PIPE, stderr=out, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Agent(kind, address, metrics, process, out)
