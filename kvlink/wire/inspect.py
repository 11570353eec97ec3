"""What a `.kvl` file says of itself, without a model: a summary, or every byte.

`describe` reads every frame through a receive session, so what it tells is also checked.
`listing` goes through the bytes of the frames, field by field.

Does not know: tensors. Place on the path: beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from kvlink.errors import RemoteProtocolError
from kvlink.receipt import warnings_of
from kvlink.v1 import wire_pb2 as pb
from kvlink.wire.file import FORMAT_VERSION, MAGIC, read_frames
from kvlink.wire.layout import kept_share, kept_tokens
from kvlink.wire.session import ManifestReceived, ReceiveSession


def recipe_of(first_frame: bytes) -> str:
    """The recipe that a transfer's first frame names. Raises what the session raises."""
    for event in ReceiveSession().receive(first_frame):
        if isinstance(event, ManifestReceived):
            return str(event.manifest.recipe)
    return ""


def is_end(frame: bytes) -> bool:
    """Whether a frame that a session has taken is the last one of its transfer."""
    return bool(pb.Frame.FromString(frame).HasField("end"))


def describe(source: BinaryIO) -> dict[str, Any]:
    """Manifest, sizes and bytes by kind. Raises what `read_frames` and the session raise."""
    session = ReceiveSession(keep=False)
    frame_bytes: list[int] = []
    for frame in read_frames(source):
        frame_bytes.append(len(frame))
        session.receive(frame)
    session.close()
    manifest = session.manifest
    if manifest is None:  # pragma: no cover - close() refuses a session without one
        return {}
    kinds = {"manifest": frame_bytes[0], **session.part_bytes}
    kinds["framing"] = sum(frame_bytes) - sum(kinds.values())
    shape, headers = manifest.shape, session.closed
    return {
        "mode": manifest.mode,
        "recipe_full": str(manifest.recipe),
        **({"warnings": list(found)} if (found := warnings_of(str(manifest.recipe))) else {}),
        "transfer_id": manifest.transfer_id.hex(),
        "context_tokens": shape.tokens,
        "kept_tokens": kept_tokens(headers, manifest.recipe),
        "kept_share": kept_share(headers, shape),
        "shape": {
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "head_size": shape.head_size,
            "dtype": shape.dtype,
        },
        "template": manifest.prompt.template_id,
        "weights": manifest.fingerprint.weights.hex(),
        "frames": len(frame_bytes),
        "segments": len(headers),
        "bytes": {kind: count for kind, count in kinds.items() if count},
        "frame_bytes": sum(frame_bytes),
        "bits_per_element": 8 * sum(frame_bytes) / shape.element_count,
    }


_SHOWN_BYTES = 12


def listing(source: BinaryIO) -> Iterator[str]:
    """One line for each field of each frame: offset in the file, bytes, name, value."""
    offset = len(MAGIC) + 4
    head = MAGIC + struct.pack("<I", FORMAT_VERSION)
    yield _line(0, head[: len(MAGIC)], "magic", "")
    yield _line(len(MAGIC), head[len(MAGIC) :], "format version", FORMAT_VERSION)
    for number, frame in enumerate(read_frames(source)):
        yield _line(offset, struct.pack("<I", len(frame)), f"length of frame {number}", len(frame))
        offset += 4
        yield from _fields(frame, offset, pb.Frame.DESCRIPTOR, "frame")
        offset += len(frame)


def _line(offset: int, data: bytes, name: str, value: Any) -> str:
    shown = data[:_SHOWN_BYTES].hex(" ") + (" …" if len(data) > _SHOWN_BYTES else "")
    return f"{offset:6}  {shown:{3 * _SHOWN_BYTES + 1}}  {name} {value}".rstrip()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
        shift += 7
    raise RemoteProtocolError(f"a varint does not end at byte {at}")


def _fields(data: bytes, base: int, descriptor: Any, path: str) -> Iterator[str]:
    """The fields of one message, in the order of its bytes; messages inside are opened."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        field = descriptor.fields_by_number.get(tag >> 3)
        name = f"{path}.{field.name if field else tag >> 3}"
        value: Any
        if tag & 7 == 2:
            size, at = _varint(data, at)
            inner = data[at : at + size]
            if field is not None and field.message_type is not None:
                yield _line(base + start, data[start:at], name, f"({size} bytes)")
                yield from _fields(inner, base + at, field.message_type, name)
            else:
                text = inner.decode("latin-1")
                readable = size <= 24 and inner.isascii() and text.rstrip("\n").isprintable()
                value = repr(text) if readable else f"({size} bytes)"
                yield _line(base + start, data[start : at + size], name, value)
            at += size
            continue
        if tag & 7 == 0:
            value, at = _varint(data, at)
            if field is not None and field.enum_type is not None:
                known = field.enum_type.values_by_number.get(value)
                value = known.name if known else value
        else:
            form, size = ("<I", 4) if tag & 7 == 5 else ("<d", 8)
            if at + size > len(data):
                raise RemoteProtocolError(f"{name}: expected {size} bytes, found {len(data) - at}")
            (value,) = struct.unpack_from(form, data, at)
            value = f"{value:#010x}" if size == 4 else value
            at += size
        yield _line(base + start, data[start:at], name, value)
