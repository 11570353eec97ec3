"""Goodput on a lossy line, beside a raw TCP transfer of the same bytes on the same line.

`python -m tests.faults.goodput` runs inside a network namespace of its own: a task as JSON in, figures
out. Congestion control is pinned per socket, on both ends of both transfers, and printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.eval import line
from kvlink.model.loading import load
from kvlink.transport.client import ReceiverClient
from kvlink.transport.server import Server
from kvlink.transport.sockets import connections, own_connections
from tests.conftest import make_checkpoint
from tests.faults.cuts import LONG
from tests.faults.mutations import QUESTION

LOSSES = (0.0, 0.01, 0.03)
LINK = line.Link(rate_bps=20e6, rtt_s=0.08)
SHAPE = {"num_hidden_layers": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048}
"""12 kB of cache a token: what travels is as large as a real model's, which its weights need not be."""
WANTED = ("bbr", "cubic", "reno")


def measure(repeats: int = 3) -> list[dict[str, Any]]:
    """A row for each loss. Raises ConfigError where a namespace fails; ask `line.why_not()` first."""
    rows = []
    for loss in LOSSES:
        link = asdict(line.Link(LINK.rate_bps, LINK.rtt_s, loss, seed=int(1000 * loss)))
        rows.append(line.run_in_namespace("tests.faults.goodput", {"link": link, "repeats": repeats}))
    return rows


def pin(sock: socket.socket, name: str) -> str:
    """Set a socket's congestion control; what is in force then."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def allowed() -> str:
    """The first of `WANTED` that a socket here may use."""
    with socket.socket() as probe:
        for name in WANTED:
            if pin(probe, name) == name:
                return name
    return "?"


def pin_all(name: str) -> set[str]:
    """Pin every TCP connection of this process, those that gRPC opened too; what is in force."""
    found = set()
    for sock in own_connections():
        with contextlib.suppress(OSError):
            sock.getpeername()
            found.add(pin(sock, name))
    return found


def raw_transfer(held: line.Line, payload: bytes, name: str) -> tuple[float, int]:
    """Seconds to carry `payload` and hear that it is there, from an open connection; bytes sent again."""
    with socket.create_server((line.HERE, 0)) as server:
        held.port = server.getsockname()[1]

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                pin(peer, name)
                left = len(payload)
                while left:
                    left -= len(peer.recv(1 << 20))
                peer.sendall(b"!")
                peer.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with socket.create_connection((line.THERE, held.port)) as sock:
            pin(sock, name)
            began = time.perf_counter()
            sock.sendall(payload)
            sock.recv(1)
            seconds = time.perf_counter() - began
            count = connections(line.THERE, held.port)[sock.getsockname()[1]]
        thread.join()
    return seconds, count.bytes_retransmitted


async def kvlink_transfer(held: line.Line, sender: Sender, receiver: Receiver, name: str) -> dict[str, Any]:
    """The same for a push, from an open connection to COMPLETE, less the receiver's decoding."""
    server = Server(f"{line.HERE}:0", receiver=ReceiverService(receiver), insecure=True)
    port = held.port = await server.start()
    frames = [*sender.pack(sender.read(f"{LONG} {LONG}"), QUESTION, "raw").frames]
    async with ReceiverClient(f"{line.THERE}:{port}", insecure=True) as peer:
        congestion = pin_all(name)
        began = time.perf_counter()
        receipt = None
        async for item in peer.push(frames):
            receipt = getattr(item, "receipt", None) or receipt
        seconds = time.perf_counter() - began
        count = peer.socket_count()
    await server.stop(0)
    assert receipt is not None
    assert count is not None
    return {
        "seconds": seconds - receipt.stage_s["decode"], "bytes": sum(map(len, frames)),
        "resent": count.bytes_retransmitted, "sent": count.bytes_sent, "congestion": sorted(congestion),
    }  # fmt: skip


def run(task: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        lm = load(str(make_checkpoint(Path(folder), "qwen2", "bfloat16", **SHAPE)))
    sender, receiver = Sender(lm), Receiver(lm)
    name = allowed()
    rows, raws, resent = [], [], []
    link = line.Link(**task["link"])
    with line.Line(link) as held:
        for _ in range(task["repeats"]):
            rows.append(asyncio.run(kvlink_transfer(held, sender, receiver, name)))
            seconds, again = raw_transfer(held, os.urandom(rows[-1]["bytes"]), name)
            raws.append(seconds)
            resent.append(again)
    size = rows[0]["bytes"]
    ours, theirs = statistics.median(row["seconds"] for row in rows), statistics.median(raws)
    return {
        "loss": link.loss, "rate_bps": link.rate_bps, "rtt_s": link.rtt_s, "repeats": task["repeats"],
        "congestion": sorted({name for row in rows for name in row["congestion"]}), "bytes": size,
        "goodput_bps": 8 * size / ours, "raw_tcp_bps": 8 * size / theirs, "ratio": theirs / ours,
        "resent_bytes": [row["resent"] for row in rows], "raw_resent_bytes": resent,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.stdin.read()))))
