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
    """Counters of one TCP connection since it was opened."""

    bytes_acked: int
    bytes_received: int
    retransmitted_segments: int


def connections(host: str, port: int) -> dict[int, SocketCount]:
    """This process's TCP connections to `host:port`, by local port; empty where none can be read."""
    if not sys.platform.startswith("linux"):
        return {}
    try:
        addresses = {str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except (OSError, ValueError):
        return {}
    return dict(found for fd in descriptors if (found := _read(fd, addresses, port)))


def _read(descriptor: int, addresses: set[str], port: int) -> tuple[int, SocketCount] | None:
    """Local port and counters behind a descriptor, if it is a connection to one of `addresses`."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return None
    try:
        sock = socket.socket(fileno=duplicate)
    except OSError:  # no socket
        os.close(duplicate)
        return None
    with sock:
        try:
            if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            peer = sock.getpeername()
            if peer[0].removeprefix("::ffff:") not in addresses or peer[1] != port:
                return None
            raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            local_port = sock.getsockname()[1]
        except OSError:  # not connected, or closed meanwhile
            return None
    if len(raw) < _NEEDED:
        return None
    acked, received = struct.unpack_from("<QQ", raw, _BYTES_ACKED)
    (retransmitted,) = struct.unpack_from("<I", raw, _TOTAL_RETRANS)
    return local_port, SocketCount(acked, received, retransmitted)
