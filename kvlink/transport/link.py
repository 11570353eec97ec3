"""A link: what carries the frames of a transfer to an agent, or from one.

    push(frames) ─▶ statuses        PushLink, to a receiver
    pull(request) ─▶ frames         PullLink, from a sender

gRPC's clients are links, a handler in this process is one (`transport.memory`), a `.kvl` file another
(`transport.file`). An agent that delivers is given what makes links, and knows none of them.

Does not know: models, what a frame says. Place on the path: under the agents, above what carries.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from kvlink.receipt import Capabilities
from kvlink.transport.api import Caller, Fetch, FrameSource, PushStatus
from kvlink.transport.sockets import SocketCount


class PushLink(Protocol):
    """A way to one receiver."""

    async def capabilities(self) -> Capabilities: ...

    def push(
        self,
        frames: Sequence[bytes] | FrameSource,
        readers: Sequence[str] = (),
        timeout_s: float = 0.0,
        asked_by: str = "",
        *,
        fresh: bool = False,
    ) -> AsyncGenerator[PushStatus | int, None]:
        """Carry a transfer; the receiver's statuses, and numbers of frames as they leave.

        No frame but the first leaves before the receiver has accepted, and none that it has. `readers`: peers
        that may use the cache beside this one; `asked_by`: one that may remove it too. `fresh`: nothing of
        this transfer was ever sent. Raises TransportError where the link breaks: pushed again it goes on; what the
        receiver raises; RemoteProtocolError where it says what cannot be.
        """
        ...

    async def put_profile(self, data: bytes) -> bytes: ...
    async def cancel(self, transfer_id: bytes) -> None: ...

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted on the link's own connection; None where there is none, or nobody can tell."""
        ...


class PullLink(Protocol):
    """A way to one sender."""

    async def capabilities(self) -> Capabilities: ...

    def fetch(self, fetch: Fetch, asked_by: str = "", *, early: bool = True) -> AsyncGenerator[bytes, None]:
        """The frames of a published context, each checked as a receiver would before it is handed out.

        With a deadline they are handed out a segment at a time, and end with the last one that has closed by
        then; where none has, the text comes if that is allowed. `early` False: whoever takes the frames looks
        at the clock. `asked_by`: for whom it is, who must be allowed to use the context too. Raises what a
        receiving session raises, and DeadlineError where there is nothing to hand out.
        """
        ...


class DialReceiver(Protocol):
    """Makes links to receivers."""

    def __call__(
        self, address: str, caller: Caller, patience_s: float = 0.0
    ) -> AbstractAsyncContextManager[PushLink]:
        """A link on behalf of `caller`. `patience_s`: so long a receiver that refuses is taken to be on its way up."""
        ...


DialSender = Callable[[str, Caller], AbstractAsyncContextManager[PullLink]]
"""Makes a link to the sender at an address, on behalf of a caller."""

CONNECT_S = 10.0
"""Seconds in which a link is made, or is not."""


AddedBytes = Callable[[Sequence[int]], dict[str, int]]
"""What a link adds to frames of these sizes, by kinds of bytes of a receipt."""


def added_by_nothing(frame_bytes: Sequence[int]) -> dict[str, int]:
    """Within a process, and in a file, whose lengths are its own business."""
    return {}


def added_by_grpc(frame_bytes: Sequence[int]) -> dict[str, int]:
    return {"grpc": grpc_bytes(frame_bytes)}


def grpc_bytes(frame_bytes: Sequence[int]) -> int:
    """Bytes that gRPC adds to frames of these sizes, computed.

    For each a tag and its length in a message of the call, and 5 before that message; an HTTP/2 frame header
    of 9 for each 16,384 bytes of the stream.
    """
    added = sum(6 + max(1, math.ceil(size.bit_length() / 7)) for size in frame_bytes)
    return added + 9 * math.ceil((sum(frame_bytes) + added) / 16_384)
