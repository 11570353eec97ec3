"""What a `.kvl` file says of itself, without a model.

Reads every frame through a receive session, so what is described is also checked.

Does not know: tensors. Place on the path: beside it.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from kvlink.payload import EncodedSegment, Part
from kvlink.wire.file import read_frames
from kvlink.wire.session import ManifestReceived, ReceiveSession, SegmentReceived, TextReceived


def describe(source: BinaryIO) -> dict[str, Any]:
    """Manifest, sizes and bytes by kind. Raises what `read_frames` and the session raise."""
    session = ReceiveSession()
    frame_bytes: list[int] = []
    kept: list[int] = []
    kinds: dict[str, int] = {}
    for frame in read_frames(source):
        frame_bytes.append(len(frame))
        for event in session.receive(frame):
            if isinstance(event, SegmentReceived):
                kept.append(event.segment.kept)
                _count(event.segment, kinds)
            elif isinstance(event, TextReceived):
                kinds["text"] = event.part.coded_bytes
            elif isinstance(event, ManifestReceived):
                kinds["manifest"] = len(frame)
    session.close()
    manifest = session.manifest
    if manifest is None:  # pragma: no cover - close() refuses a session without one
        return {}
    kinds["framing"] = sum(frame_bytes) - sum(kinds.values())
    shape = manifest.shape
    return {
        "mode": manifest.mode,
        "recipe_full": str(manifest.recipe),
        "transfer_id": manifest.transfer_id.hex(),
        "context_tokens": shape.tokens,
        "kept_tokens": kept[0] if kept else 0,
        "shape": {
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "head_size": shape.head_size,
            "dtype": shape.dtype,
        },
        "template": manifest.prompt.template_id,
        "weights": manifest.fingerprint.weights.hex(),
        "frames": len(frame_bytes),
        "segments": len(kept) or 1,
        "bytes": {kind: count for kind, count in kinds.items() if count},
        "frame_bytes": sum(frame_bytes),
        "bits_per_element": 8 * sum(frame_bytes) / shape.element_count,
    }


def _count(body: EncodedSegment | Part, kinds: dict[str, int]) -> None:
    if isinstance(body, EncodedSegment):
        for kind, count in body.bytes_by_kind().items():
            kinds[kind] = kinds.get(kind, 0) + count
