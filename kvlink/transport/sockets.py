"""What the kernel says of a connection: bytes acknowledged and retransmitted.

gRPC has no call for it. On Linux a duplicate of the connection's descriptor, found by its peer's
address, answers TCP_INFO; elsewhere the answer is None and the receipt says so.

Does not know: gRPC, frames. Place on the path: beside it.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

# Offsets in struct tcp_info of the kernel's public headers; it only ever grows at its end.
_FIELDS = {
    "bytes_acked": (120, "Q"),
    "bytes_received": (128, "Q"),
    "retransmitted_segments": (100, "I"),
    "segments_out": (136, "I"),
    "segments_in": (140, "I"),
    "data_segments_out": (156, "I"),
    "bytes_sent": (200, "Q"),
    "bytes_retransmitted": (208, "Q"),
    "segment_bytes": (16, "I"),
}
_NEEDED = 216


@dataclass(frozen=True, slots=True)
class SocketCount:
    """Counters of one TCP connection since it was opened.

    `bytes_sent` has what was sent again in it, `bytes_retransmitted` is that alone. `segments_out`
    counts bare acknowledgements too, `data_segments_out` only those with bytes. `segment_bytes`:
    the largest segment (MSS) at this moment.
    """

    bytes_acked: int
    bytes_received: int
    retransmitted_segments: int
    segments_out: int
    segments_in: int
    data_segments_out: int
    bytes_sent: int
    bytes_retransmitted: int
    segment_bytes: int

    def since(self, before: SocketCount) -> SocketCount:
        """What happened between two readings of one connection."""
        counts = {name: getattr(self, name) - getattr(before, name) for name in _FIELDS}
        return SocketCount(**{**counts, "segment_bytes": self.segment_bytes})


def connections(host: str, port: int) -> dict[int, SocketCount]:
    """This process's TCP connections to `host:port`, by local port; empty where none can be read."""
    try:
        addresses = {str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, ValueError):
        return {}
    return dict(found for sock in own_connections() if (found := _read(sock, addresses, port)))


def own_connections() -> Iterator[socket.socket]:
    """Every TCP connection of this process, those of libraries too: duplicates, each closed after its turn."""
    if not sys.platform.startswith("linux"):
        return
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except (OSError, ValueError):
        return
    for descriptor in descriptors:
        try:
            duplicate = os.dup(descriptor)
        except OSError:
            continue
        try:
            sock = socket.socket(fileno=duplicate)
        except OSError:  # no socket
            os.close(duplicate)
            continue
        with sock:
            if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                yield sock


def _read(sock: socket.socket, addresses: set[str], port: int) -> tuple[int, SocketCount] | None:
    """Local port and counters of a connection, if it is one to `addresses`."""
    try:
        peer = sock.getpeername()
        if peer[0].removeprefix("::ffff:") not in addresses or peer[1] != port:
            return None
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        local_port = sock.getsockname()[1]
    except OSError:  # not connected, or closed meanwhile
        return None
    if len(raw) < _NEEDED:
        return None
    return local_port, SocketCount(
        **{name: struct.unpack_from("=" + kind, raw, offset)[0] for name, (offset, kind) in _FIELDS.items()}
    )
