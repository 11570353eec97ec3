"""Handles: `kvlink://host:port/id`, the short string that stands for a published context.

A handle is an address, never the credential. It travels in any agent framework's message.

Does not know: what it stands for. Place on the path: beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvlink.errors import ConfigError
from kvlink.transport.address import Address

_PATTERN = re.compile(r"kvlink://([^/\s]+)/([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True, slots=True)
class Handle:
    address: str
    context_id: str

    def __str__(self) -> str:
        return f"kvlink://{self.address}/{self.context_id}"

    @classmethod
    def parse(cls, text: str) -> Handle:
        """Raises ConfigError."""
        match = _PATTERN.fullmatch(text)
        if not match:
            raise ConfigError(f"expected a handle such as kvlink://127.0.0.1:50051/ID, got {text!r}")
        return cls(str(Address.parse(match[1])), match[2])
