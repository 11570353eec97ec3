"""Receipts and capabilities: what a transfer cost, and what an agent says of itself.

Does not know: how the figures were measured. Place on the path: ground floor; travels beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvlink.codecs import CODECS, NO_CALIBRATION
from kvlink.payload import Fingerprint
from kvlink.sketch import Sketch

STAGES = (
    "prefill",
    "draft",
    "select",
    "encode",
    "verify",
    "wire",
    "decode",
    "read",
    "first_token",
    "generate",
)
"""Stages in the order of the path. `read`: the receiver's own prefill in text mode."""

BYTE_KINDS = ("manifest", "map", "scales", "codes", "text", "framing", "grpc")
"""Kinds of bytes. `framing`: headers, chunks, digests. `grpc`: message and HTTP/2 headers."""

UNCALIBRATED = (
    "the transform codec had no profile of this model: what such a message keeps of the context was not measured; "
    "check it with --verify, or make a profile with 'kvlink profile build'"
)


def warnings_of(recipe: str) -> tuple[str, ...]:
    """What is not known of a transfer with this recipe, in words."""
    return (UNCALIBRATED,) if f"basis={NO_CALIBRATION}" in recipe.split() else ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the sender found when it decoded its own message and read its own answer from it.

    `agreeing_tokens` of `tokens`: where the message's cache chooses the token that the full cache
    chose. `kl_mean`: KL(full ‖ message) of the next-token distributions, nats. `logit_error`: the
    largest difference of a logit. `escalations`: times that the message was made finer.
    """

    agreeing_tokens: int
    tokens: int
    kl_mean: float
    logit_error: float
    escalations: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the receiver will answer this question as the sender would."""
        return self.agreeing_tokens == self.tokens


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one transfer cost. Seconds by stage, bytes by kind, all of them.

    `socket_bytes`: acknowledged on the connection as the kernel counts, 0 where it cannot be asked.
    `kept_tokens`: positions of each set that a selection brought; `kept_share`: all that are there of the
    context's, mean over layers and heads, in (0, 1]. `segments`: those that have closed.
    `element_count`: elements of the full, unselected context cache.
    """

    transfer_id: str = ""
    recipe: str = ""
    context_tokens: int = 0
    kept_tokens: int = 0
    kept_share: float = 1.0
    cache_digest: str = ""
    element_count: int = 0
    segments: int = 1
    stage_s: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    socket_bytes: int = 0
    certificate: Certificate | None = None

    @property
    def is_text(self) -> bool:
        """Whether the text travelled, and no cache."""
        return self.recipe == "text"

    @property
    def wire_bytes(self) -> int:
        """Everything that the transfer put on its connection, computed."""
        return sum(self.bytes.values())

    @property
    def bits_per_element(self) -> float:
        """8 · wire bytes ÷ elements of the full context cache. BF16 uncompressed is 16."""
        return 8 * self.wire_bytes / self.element_count if self.element_count else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not known of this transfer, in words."""
        return warnings_of(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON knows them; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Receipt:
        found = told.get("certificate")
        return cls(**{**told, "certificate": Certificate(**found) if found else None})

    def with_stages(self, **stage_s: float) -> Receipt:
        return replace(self, stage_s={**self.stage_s, **stage_s})


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a release of an agent speaks: protocol versions, both inclusive, modes, codecs by their names in
    `kvlink.codecs`, coders. Of this release as it stands."""

    protocol_min: int = 1
    protocol_max: int = 1
    modes: tuple[str, ...] = ("kv", "text")
    codecs: tuple[str, ...] = tuple(CODECS)
    coders: tuple[str, ...] = ("identity", "zstd", "rans")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an agent is and can do.

    `limits`: by name, in bytes, tokens or counts. `address`: where it says that others reach it, empty where
    it says nothing.
    """

    model_name: str
    fingerprint: Fingerprint
    dtype: str
    release: str
    spoken: Spoken = field(default_factory=Spoken)
    limits: dict[str, int] = field(default_factory=dict)
    sketch: Sketch | None = None
    prefill_tokens_per_s: float = 0.0
    profiles: tuple[bytes, ...] = ()
    address: str = ""
