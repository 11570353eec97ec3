"""Protobuf messages and Python values, pair by pair, checked at the border.

Purpose: the rest of the package never sees a generated class of `wire.proto`. A manifest is checked
against the table of fields, and then what several fields say together.

Does not know: sessions, sockets, tensors. Place on the path: just inside the wire.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

from kvlink.codecs import Codec
from kvlink.errors import IdentityError, KvlinkError, RemoteProtocolError
from kvlink.payload import Base, CacheShape, Fingerprint, Mode, Prompt, SegmentHeader, Turn
from kvlink.recipe import Recipe
from kvlink.sketch import Sketch
from kvlink.v1 import common_pb2
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire import checked
from kvlink.wire.mapping import read, write

PROTOCOL_VERSION = 1
DIGEST_BYTES = 16
TRANSFER_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """The first frame's content. `text_bytes`: UTF-8 size of the text in text mode. `deadline_ms`: after which
    what has closed is enough, 0 where only the whole is."""

    transfer_id: bytes
    fingerprint: Fingerprint
    shape: CacheShape
    recipe: Recipe
    prompt: Prompt
    context_digest: bytes
    text_bytes: int = 0
    sketch: Sketch | None = None
    base: Base | None = None
    deadline_ms: int = 0
    protocol_version: int = PROTOCOL_VERSION

    @property
    def mode(self) -> Mode:
        return self.recipe.mode


_DTYPES = {"bfloat16": pb.DTYPE_BFLOAT16, "float16": pb.DTYPE_FLOAT16, "float32": pb.DTYPE_FLOAT32}
_MODES: dict[Mode, pb.Mode] = {"kv": pb.MODE_KV, "text": pb.MODE_TEXT}


def fingerprint_to_proto(value: Fingerprint) -> pb.Fingerprint:
    return pb.Fingerprint(**{f.name: getattr(value, f.name) for f in fields(value)})


def fingerprint_from_proto(message: pb.Fingerprint) -> Fingerprint:
    return Fingerprint(**{f.name: bytes(getattr(message, f.name)) for f in fields(Fingerprint)})


def sketch_to_proto(value: Sketch | None) -> pb.Sketch | None:
    return None if value is None else pb.Sketch(layers=value.layers, numbers=value.numbers)


def sketch_from_proto(message: pb.Manifest | common_pb2.Capabilities) -> Sketch | None:
    """The sketch of a message that may have one. Raises RemoteProtocolError where it is none."""
    if not message.HasField("sketch"):
        return None
    try:
        return Sketch(message.sketch.layers, tuple(message.sketch.numbers))
    except IdentityError as error:
        raise RemoteProtocolError(str(error)) from error


def recipe_to_proto(recipe: Recipe) -> pb.Recipe:
    message = pb.Recipe()
    write(recipe, message)
    return message


def recipe_from_proto(message: pb.Recipe) -> Recipe:
    """Raises RemoteProtocolError and RecipeError where a value is not of its set or out of range."""
    return cast(Recipe, read(message, Recipe))


def header_to_proto(header: SegmentHeader, index: int) -> pb.SegmentHeader:
    message = pb.SegmentHeader(index=index)
    if header.codec is not None:
        write(header.codec, message.codec)
    if header.adds == "positions":
        message.positions.kept, message.positions.map_sets = header.kept, header.map_sets
        message.positions.sliding = header.sliding
    elif header.adds == "refinement":
        message.refinement.kept, message.refinement.map_sets = header.kept, header.map_sets
    else:
        message.text.SetInParent()
    return message


def header_from_proto(message: pb.SegmentHeader) -> SegmentHeader:
    """Raises RemoteProtocolError where it does not say what it adds; RecipeError for an impossible codec."""
    checked.check(message, RemoteProtocolError, "segment header")
    adds = message.WhichOneof("adds")
    codec = cast(Codec, read(message.codec, Codec)) if message.HasField("codec") else None
    if adds == "positions":
        told = message.positions
        return SegmentHeader("positions", codec, told.kept, told.map_sets, told.sliding)
    if adds == "refinement":
        return SegmentHeader("refinement", codec, message.refinement.kept, message.refinement.map_sets)
    if adds != "text" or codec is not None:
        raise RemoteProtocolError("a segment adds positions, a refinement or a text without a codec")
    return SegmentHeader("text")


def shape_to_proto(shape: CacheShape) -> pb.CacheShape:
    return pb.CacheShape(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        tokens=shape.tokens,
        head_size=shape.head_size,
        dtype=_DTYPES[shape.dtype],
        whole_layers=[pb.WholeLayer(layer=i, held_tokens=n) for i, n in shape.whole_layers],
    )


def shape_from_proto(message: pb.CacheShape) -> CacheShape:
    dtype = next((name for name, number in _DTYPES.items() if number == message.dtype), None)
    if dtype is None:
        raise RemoteProtocolError(f"shape.dtype must be one of {', '.join(_DTYPES)}, found {message.dtype}")
    whole = tuple((w.layer, w.held_tokens) for w in message.whole_layers)
    layers = [layer for layer, _ in whole]
    if layers != sorted(set(layers)) or any(layer >= message.layers for layer in layers):
        raise RemoteProtocolError(
            f"shape.whole_layers must name layers in order and once, found {layers[:8]}"
        )
    if any(not 1 <= held <= message.tokens for _, held in whole):
        raise RemoteProtocolError("shape.whole_layers: held tokens must be from 1 to shape.tokens")
    return CacheShape(message.layers, message.kv_heads, message.tokens, message.head_size, dtype, whole)


def manifest_to_proto(value: Manifest) -> pb.Manifest:
    return pb.Manifest(
        protocol_version=value.protocol_version,
        transfer_id=value.transfer_id,
        mode=_MODES[value.mode],
        fingerprint=fingerprint_to_proto(value.fingerprint),
        shape=shape_to_proto(value.shape),
        recipe=recipe_to_proto(value.recipe),
        prompt=pb.Prompt(
            template_id=value.prompt.template_id,
            before=value.prompt.before,
            after=value.prompt.after,
            turns=[pb.Turn(role=turn.role, content=turn.content) for turn in value.prompt.turns],
        ),
        context_digest=value.context_digest,
        text_bytes=value.text_bytes,
        sketch=sketch_to_proto(value.sketch),
        base=None
        if (base := value.base) is None
        else pb.Base(digest=base.digest, tokens=base.tokens, kept=base.kept),
        deadline_ms=value.deadline_ms,
    )


def _base_from_proto(message: pb.Manifest) -> Base | None:
    if not message.HasField("base"):
        return None
    base = message.base
    if message.mode != pb.MODE_KV:
        raise RemoteProtocolError("manifest.base: a text adds to nothing")
    if not 1 <= base.kept <= base.tokens <= message.shape.tokens:
        raise RemoteProtocolError(
            f"manifest.base: expected 1 to {message.shape.tokens} tokens and as many positions at most, "
            f"found {base.tokens} and {base.kept}"
        )
    return Base(base.digest, base.tokens, base.kept)


def _prompt_from_proto(message: pb.Prompt) -> Prompt:
    for name in ("before", "after"):
        try:
            getattr(message, name).decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"prompt.{name} is not UTF-8: {error}") from error
    turns = tuple(Turn(turn.role, turn.content) for turn in message.turns)
    return Prompt(message.template_id, message.before, message.after, turns)


def manifest_from_proto(message: pb.Manifest) -> Manifest:
    """Raises RemoteProtocolError where a field is missing or out of range."""
    checked.check(message, RemoteProtocolError, "manifest")
    if message.protocol_version != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"protocol version: expected {PROTOCOL_VERSION}, found {message.protocol_version}"
        )
    try:
        recipe = recipe_from_proto(message.recipe)
    except KvlinkError as error:
        raise RemoteProtocolError(f"manifest.recipe: {error}") from error
    if message.mode != _MODES[recipe.mode]:
        raise RemoteProtocolError(f"mode {message.mode} does not fit the recipe's {recipe.mode!r}")
    if message.deadline_ms and recipe.mode == "text":
        raise RemoteProtocolError("manifest.deadline_ms: a text comes whole or not at all, expected none")
    return Manifest(
        transfer_id=message.transfer_id,
        fingerprint=fingerprint_from_proto(message.fingerprint),
        shape=shape_from_proto(message.shape),
        recipe=recipe,
        prompt=_prompt_from_proto(message.prompt),
        context_digest=message.context_digest,
        text_bytes=message.text_bytes,
        sketch=sketch_from_proto(message),
        base=_base_from_proto(message),
        deadline_ms=message.deadline_ms,
        protocol_version=message.protocol_version,
    )
