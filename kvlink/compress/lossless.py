"""Lossless coding of bytes: zstd or nothing, and byte planes for raw floats.

Does not know: what the bytes mean. Place on the path: the last step before a part is framed.
"""

from __future__ import annotations

import numpy as np
import zstandard

from kvlink.errors import CodecError
from kvlink.payload import Part, PartKind
from kvlink.recipe import Coder

_LEVEL = 1  # on quantization codes higher levels find no more, level 3 finds less


def pack_part(kind: PartKind, plain: bytes, coder: Coder) -> Part:
    """A part of `plain`, packed by `coder` where that makes it smaller."""
    if coder == "zstd" and plain:
        packed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(plain)
        if len(packed) < len(plain):
            return Part(kind, "zstd", len(plain), packed)
    return Part(kind, "identity", len(plain), plain)


def unpack_part(part: Part) -> bytes:
    """The plain bytes of a part. Raises CodecError; never makes more than `plain_bytes`.

    zstd ignores an output limit where the frame declares its own size, so the declared size is
    compared before anything is allocated and a frame that declares none is refused.
    """
    if part.coder == "identity":
        if len(part.data) != part.plain_bytes:
            raise CodecError(f"{part.kind}: expected {part.plain_bytes} bytes, found {len(part.data)}")
        return part.data
    if part.coder != "zstd":
        raise CodecError(f"{part.kind}: {part.coder} is not a coder of plain bytes")
    try:
        declared = zstandard.get_frame_parameters(part.data).content_size
        if declared != part.plain_bytes:
            raise CodecError(
                f"{part.kind}: expected {part.plain_bytes} plain bytes, the zstd frame declares {declared}"
            )
        plain = zstandard.ZstdDecompressor().decompress(part.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"{part.kind}: not a zstd frame: {error}") from error
    if len(plain) != part.plain_bytes:
        raise CodecError(f"{part.kind}: expected {part.plain_bytes} plain bytes, found {len(plain)}")
    return plain


def to_planes(data: bytes, element_bytes: int) -> bytes:
    """All first bytes of the elements, then all second bytes, and so on."""
    return np.frombuffer(data, np.uint8).reshape(-1, element_bytes).T.tobytes()


def split_planes(data: bytes, element_bytes: int) -> list[bytes]:
    """The planes of `to_planes`, each on its own."""
    return [plane.tobytes() for plane in np.frombuffer(data, np.uint8).reshape(-1, element_bytes).T]


def from_planes(data: bytes, element_bytes: int) -> bytes:
    """Undo `to_planes`."""
    return np.frombuffer(data, np.uint8).reshape(element_bytes, -1).T.tobytes()
