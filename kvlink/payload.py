"""Coded tensors and identities: bytes and numbers that cross from room to room.

Does not know: torch, frames, how the bytes were made. Place on the path: ground floor, the
value between quantize/code and frame.

A transfer is a list of segments. A segment says what it adds and by which codec; its groups, a layer each, bring the
parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from kvlink.codecs.base import PART_KINDS, Codec, PartCoder, PartKind, Side
from kvlink.errors import ContextError, IdentityError

Mode = Literal["kv", "text"]
DEADLINE_MS = 3_600_000
"""The longest deadline of a transfer, in milliseconds."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a model by components, each 16 bytes."""

    weights: bytes
    architecture: bytes
    rotary: bytes
    tokenizer: bytes
    template: bytes

    def require_match(self, other: Fingerprint, mode: Mode) -> None:
        """Raise IdentityError, naming what differs, unless `other` serves for `mode`.

        `kv` needs all components, `text` the tokenizer and the template.
        """
        names = [f.name for f in fields(self)] if mode == "kv" else ["tokenizer", "template"]
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise IdentityError(
                    f"{name} differ: here {mine.hex()[:12]}, at the peer {theirs.hex()[:12]}; "
                    f"mode {mode} needs the same {', '.join(names)} at both ends"
                )


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier turn of the conversation that the context belongs to."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ContextError(f"a turn's role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise ContextError(f"a turn's content is a text, got {self.content!r}")


TurnLike = Turn | tuple[str, str] | Mapping[str, str]
"""An earlier turn as people have it: a `Turn`, (role, content), or {"role": …, "content": …}."""


def turns_from(turns: Iterable[TurnLike]) -> tuple[Turn, ...]:
    """Earlier turns in one form. Raises ContextError for what is none, and for parts of a message that would be lost."""
    return tuple(_turn_from(index, turn) for index, turn in enumerate(turns))


def _turn_from(index: int, turn: TurnLike) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if isinstance(turn, Mapping):
        if set(turn) == {"role", "content"}:
            return Turn(turn["role"], turn["content"])
        names = ", ".join(map(str, turn)) or "nothing"
        raise ContextError(f"turn {index}: expected role and content, got {names}")
    if isinstance(turn, (tuple, list)) and len(turn) == 2:
        return Turn(*turn)
    raise ContextError(f"turn {index}: expected a Turn, (role, content) or {{role, content}}, got {turn!r}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands around the context: text = before · context · after, then the question.

    `before` is what the template writes for `turns`. Markers of the template inside a turn are text, as
    they are inside the context: the bytes alone do not tell the two apart, the turns do.
    """

    template_id: str
    before: bytes
    after: bytes
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind. `plain_bytes`: their size after the coder is undone.

    `coder` names how `data` was packed: `identity`, `zstd`, or `rans` (codes of the transform codec).
    """

    kind: PartKind
    coder: PartCoder
    plain_bytes: int
    data: bytes

    @property
    def coded_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """Keys or values of one layer. `shape` is `[Hkv, K, D]`, K the kept tokens.

    `scale_bytes` is 2 (float16) or 4 (float32, where float16 cannot hold the scales).
    """

    layer: int
    side: Side
    shape: tuple[int, int, int]
    scale_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The shape of a full context cache, in numbers only.

    `layers` L, `kv_heads` Hkv, `tokens` T (the logical length), `head_size` D, `dtype` one of
    bfloat16, float16, float32. `whole_layers`: layers that travel whole whatever the selection
    (sliding windows), with the positions that they hold.
    """

    layers: int
    kv_heads: int
    tokens: int
    head_size: int
    dtype: str
    whole_layers: tuple[tuple[int, int], ...] = ()
    """(layer, held tokens) of layers with a sliding window; the held tokens are the last ones."""

    def held_tokens(self, layer: int, kept: int) -> int:
        """Positions of a layer that travel where the others keep `kept`."""
        return dict(self.whole_layers).get(layer, kept)

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def element_count(self) -> int:
        """Elements of the full, unselected context cache; the denominator of bits per element."""
        held = dict(self.whole_layers)
        tokens = sum(held.get(layer, self.tokens) for layer in range(self.layers))
        return 2 * tokens * self.kv_heads * self.head_size

    @property
    def cache_bytes(self) -> int:
        return self.element_count * self.element_bytes


@dataclass(frozen=True, slots=True)
class Base:
    """A cache that a transfer adds to. `digest`: 16 bytes that name it, see `Base` in the proto. `tokens`: what it
    stands for, the first ones of the context. `kept`: its positions in each set."""

    digest: bytes
    tokens: int
    kept: int


Adds = Literal["positions", "refinement", "text"]


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment adds to what came before it, and by which codec.

    `positions`: keys and values of `kept` positions more in each set. `refinement`: finer ones of `kept`
    positions that are there. `text`: the context's text; no codec then.
    `map_sets`: sets in the selection map: 0 (no map: all positions that are missing, or all that are there),
    1 (shared), or full-attention layers · Hkv. `sliding`: layers with a sliding window come too, whole.
    """

    adds: Adds
    codec: Codec | None = None
    kept: int = 0
    map_sets: int = 0
    sliding: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that travel, and may be used, together: the selection map, keys and values of one layer, or a
    text. `scale_bytes`: 2 or 4 for each tensor."""

    parts: tuple[Part, ...]
    scale_bytes: tuple[int, ...] = ()

    @property
    def coded_bytes(self) -> int:
        return sum(part.coded_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Segment:
    """A header and its groups: the map where there is one, then the layers in order; or the text."""

    header: SegmentHeader
    groups: tuple[Group, ...]

    @classmethod
    def of_text(cls, part: Part) -> Segment:
        return cls(SegmentHeader("text"), (Group((part,)),))


def count_kinds(groups: Iterable[Group]) -> dict[str, int]:
    """Coded bytes by kind of part."""
    total: dict[str, int] = dict.fromkeys(PART_KINDS, 0)
    for group in groups:
        for part in group.parts:
            total[part.kind] += part.coded_bytes
    return total
