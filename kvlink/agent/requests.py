"""What a sender is asked for: when two requests are the same, and what is sent in the place of one that is late.

Does not know: sockets, contexts. Place on the path: beside the sender's service.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from blake3 import blake3

from kvlink.recipe import Target
from kvlink.transport.api import Delivery, Fetch
from kvlink.wire.messages import TRANSFER_ID_BYTES


def as_text(delivery: Delivery) -> Delivery:
    """The same delivery with the text in place of the cache, under a name that follows from its own."""
    key = text_id(delivery.delivery_id) if delivery.delivery_id else b""
    return replace(delivery, recipe="text", target=Target(), base_digest=b"", delivery_id=key)


def text_id(delivery_id: bytes) -> bytes:
    """The name of the delivery of a text that takes the place of a named one."""
    return blake3(b"text" + delivery_id).digest(length=TRANSFER_ID_BYTES)


def request_digest(request: Delivery | Fetch) -> str:
    """What tells one request from another: what it asks for beyond what is asked for where nobody says so,
    so that a request stays the same when a later release knows another field."""
    return blake3(json.dumps(_asked(request), sort_keys=True).encode()).hexdigest()


def _asked(value: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for field in fields(value):
        found = getattr(value, field.name)
        if field.default_factory is not MISSING:
            default: Any = field.default_factory()
        else:
            default = field.default
        if found != default:
            asked[field.name] = (
                _asked(found) if is_dataclass(found) else found.hex() if isinstance(found, bytes) else found
            )
    return asked
