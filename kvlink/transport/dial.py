"""Links over gRPC, as agents are given them: a client for each, with the credentials meant for its peer.

`credentials`: who this agent is. `insecure`: off loopback without encryption.

Does not know: what is sent. Place on the path: handed to an agent by whoever starts it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from kvlink.transport.api import Caller
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.credentials import Credentials
from kvlink.transport.link import DialReceiver, DialSender, PullLink, PushLink


def to_receivers(credentials: Credentials | None = None, *, insecure: bool = False) -> DialReceiver:
    def dial(address: str, caller: Caller, patience_s: float = 0.0) -> AbstractAsyncContextManager[PushLink]:
        return ReceiverClient(
            address, credentials, insecure=insecure, trace=caller.trace, patience_s=patience_s
        )

    return dial


def to_senders(credentials: Credentials | None = None, *, insecure: bool = False) -> DialSender:
    def dial(address: str, caller: Caller) -> AbstractAsyncContextManager[PullLink]:
        return SenderClient(address, credentials, insecure=insecure, trace=caller.trace)

    return dial
