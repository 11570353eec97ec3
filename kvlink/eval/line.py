"""A line of known rate, delay and loss, over real kernel TCP, without special rights.

Inside a network namespace of its own a TUN device carries packets for 10.9.0.2; a relay holds each
one back, drops some, swaps source and destination and hands it to the kernel again, where it
arrives at 10.9.0.1 from 10.9.0.2. One namespace is enough: a swap leaves all checksums right.

Needs Linux, `unshare`, `ip` and /dev/net/tun; `why_not` says what is missing.

Does not know: gRPC, transfers. Place on the path: between two sockets, for measuring.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Self

from kvlink.errors import ConfigError

HERE, THERE = "10.9.0.1", "10.9.0.2"
MTU = 1500
_DEVICE = "kvlink0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
_CHILD_S = 600


@dataclass(frozen=True, slots=True)
class Link:
    """`rate_bps` bits a second, `rtt_s` seconds there and back, `loss` of packets in [0, 1)."""

    rate_bps: float = 100e6
    rtt_s: float = 0.02
    loss: float = 0.0
    seed: int = 0


@cache
def why_not() -> str:
    """What this machine lacks for a line of its own; empty where it lacks nothing."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"the command {tool} is not installed"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    probe = "import kvlink.eval.line as line\nwith line.Line(line.Link()): pass"
    command = [*_NAMESPACE, sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return f"a namespace with a TUN device is refused: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return ""


def run_in_namespace(module: str, task: Mapping[str, Any]) -> Any:
    """Run `python -m module` in a namespace of its own: `task` as JSON in, its JSON answer out.

    Raises ConfigError with the child's last words where it fails.
    """
    done = subprocess.run(
        [*_NAMESPACE, sys.executable, "-m", module],
        input=json.dumps(task), capture_output=True, text=True, timeout=_CHILD_S,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"the measurement on a line of its own failed: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Line:
    """The line, while the context lasts. Only inside a namespace of its own.

    Listen on `HERE`, dial `THERE`, and set `port` to the one that listens: its packets queue apart.
    `dropped`: packets that the line lost so far.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.port = 0
        self.dropped = 0
        self._rng = random.Random(link.seed)
        self._device = -1
        self._stop = threading.Event()
        self._relay = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self._device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        for words in (
            "link set lo up",
            f"addr add {HERE}/24 dev {_DEVICE}",
            f"link set {_DEVICE} up mtu {MTU} txqueuelen 10000",
        ):
            subprocess.run(["ip", *words.split()], check=True, capture_output=True)
        self._relay.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._relay.join()
        os.close(self._device)

    def _run(self) -> None:
        """Packets out of the kernel, through the line's queue, and back in."""
        held: list[tuple[float, int, bytes]] = []
        free = {HERE: 0.0, THERE: 0.0}  # when each direction has sent what it has
        number = 0
        while not self._stop.is_set():
            wait = held[0][0] - time.monotonic() if held else 0.05
            if select.select([self._device], [], [], min(0.05, max(0.0, wait)))[0]:
                packet = os.read(self._device, MTU + 100)
                if packet[0] >> 4 == 4 and self._passes():
                    way = HERE if _source_port(packet) == self.port else THERE
                    begin = max(time.monotonic(), free[way])
                    free[way] = begin + 8 * len(packet) / self.link.rate_bps
                    heapq.heappush(held, (free[way] + self.link.rtt_s / 2, number, _turned(packet)))
                    number += 1
            while held and held[0][0] <= time.monotonic():
                os.write(self._device, heapq.heappop(held)[2])

    def _passes(self) -> bool:
        lost = self._rng.random() < self.link.loss
        self.dropped += lost
        return not lost


def _turned(packet: bytes) -> bytes:
    """The packet with source and destination swapped; the checksums stay right."""
    return packet[:12] + packet[16:20] + packet[12:16] + packet[20:]


def _source_port(packet: bytes) -> int:
    header = 4 * (packet[0] & 15)
    return int.from_bytes(packet[header : header + 2], "big")
