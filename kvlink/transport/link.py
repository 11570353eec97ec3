"""A link carries the frames of a transfer, and adds bytes of its own.

Does not know: how a link is made, what a frame says. Place on the path: under the agents, above gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def grpc_bytes(frame_bytes: Sequence[int]) -> int:
    """Bytes that gRPC adds to frames of these sizes, computed.

    For each a tag and its length in a message of the call, and 5 before that message; an HTTP/2 frame header
    of 9 for each 16,384 bytes of the stream.
    """
    added = sum(6 + max(1, math.ceil(size.bit_length() / 7)) for size in frame_bytes)
    return added + 9 * math.ceil((sum(frame_bytes) + added) / 16_384)
