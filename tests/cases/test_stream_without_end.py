"""A sender that never stops: `kvlink fetch` kept all of it in memory, looked at none, and took the machine down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvlink.v1 import sender_pb2
from tests.command import kvlink
from tests.forging import forged
from tests.liar import capabilities, lying

PIECE = bytes(1_000_000)
SENT_BYTES = 1_500_000_000
"""The sender stops there; the command is to be gone long before."""
MEMORY_BYTES = 700_000_000


@pytest.mark.parametrize("beginning", [0, 2])
def test_the_first_frame_that_is_none_ends_a_fetch(honest, tmp_path, beginning):
    sent = 0

    def endless(request: Any, context: Any) -> Iterator[sender_pb2.FetchCacheResponse]:
        nonlocal sent
        frames = forged(honest("raw"), lambda manifest: setattr(manifest, "transfer_id", request.transfer_id))
        for frame in frames[:beginning]:
            yield sender_pb2.FetchCacheResponse(frame=frame)
        head = frames[beginning][:40] if beginning else b""
        while context.is_active() and sent < SENT_BYTES:
            sent += len(PIECE)
            yield sender_pb2.FetchCacheResponse(frame=head + PIECE)

    out = tmp_path / "context.kvl"
    with lying(GetCapabilities=lambda *_: capabilities(), FetchCache=endless) as liar:
        handle = f"kvlink://{liar}/AAAAAAAAAAAAAAAAAAAAAA"
        done = kvlink("fetch", handle, "--question", "Who?", "-o", str(out))
    assert done.returncode in (5, 6), done.stderr
    assert sent, "it was asked"
    assert sent < MEMORY_BYTES, "so much at most can it have kept"
    assert list(tmp_path.iterdir()) == []
