"""The arithmetic of the codecs: keys or values of one layer to parts, and back.

Each codec of `kvlink.codecs.CODECS` has a module of its name here with two functions:

    encode(codec, tensor, place, coder, context) → (bytes a scale, parts)
    decode(codec, parts, scale_bytes, place, dtype, shape, context) → tensor

Does not know: segments, selections, the wire. Place on the path: under `compress.codec`.
"""

from __future__ import annotations

from kvlink.compress.codecs.base import CodecContext, Place

__all__ = ["CodecContext", "Place"]
