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
from dataclasses import dataclass

# struct tcp_info: 8 bytes of flags, 24 of u32, then u64: pacing rates, bytes_acked, bytes_received
_BYTES_ACKED, _BYTES_RECEIVED, _TOTAL_RETRANS, _NEEDED = 120, 128, 100, 136


@dataclass(frozen=True, slots=True)
class SocketCount:
    """Sums over the connections of this process to one peer."""

    bytes_acked: int
    bytes_received: int
    retransmitted_segments: int
    connections: int


def count_peer(host: str, port: int) -> SocketCount | None:
    """Counters of this process's TCP connections to `host:port`; None where they cannot be read."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        addresses = {item[4][0] for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except (OSError, ValueError):
        return None
    found = [info for fd in descriptors if (info := _info(fd, addresses, port))]
    if not found:
        return None
    return SocketCount(
        sum(i[0] for i in found), sum(i[1] for i in found), sum(i[2] for i in found), len(found)
    )


def _info(descriptor: int, addresses: set[str], port: int) -> tuple[int, int, int] | None:
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return None
    try:
        with socket.socket(fileno=duplicate) as sock:
            if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            peer = sock.getpeername()
            if peer[0].removeprefix("::ffff:") not in addresses or peer[1] != port:
                return None
            raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        try:
            os.close(duplicate)
        except OSError:
            pass
        return None
    if len(raw) < _NEEDED:
        return None
    acked, received = struct.unpack_from("<QQ", raw, _BYTES_ACKED)
    (retransmitted,) = struct.unpack_from("<I", raw, _TOTAL_RETRANS)
    return acked, received, retransmitted
