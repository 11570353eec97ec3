"""Transfers that lie and whose checksums and digests are right, as somebody makes them who knows the format."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence

import google_crc32c
from blake3 import blake3

from kvlink.v1 import wire_pb2 as pb


def forged(
    frames: Iterable[bytes],
    manifest: Callable[[pb.Manifest], object] = lambda _: None,
    body: Callable[[bytes], bytes] = lambda data: data,
    text: tuple[int, bytes] | None = None,
) -> list[bytes]:
    """The transfer under an id of its own, with another manifest and other bytes of its groups.

    `manifest` changes the message in place; `body` maps the bytes of all groups, joined, to as many others;
    `text`: (coder, coded bytes) of the one part of a text.
    """
    parsed = [pb.Frame.FromString(frame) for frame in frames]
    parsed[0].manifest.transfer_id = secrets.token_bytes(16)
    manifest(parsed[0].manifest)
    if text is not None:
        (group,) = [frame.group for frame in parsed if frame.HasField("group")]
        group.parts[0].coder, group.data = text
        group.parts[0].coded_bytes = len(group.data)
    holders = [getattr(f, f.WhichOneof("body")) for f in parsed if f.WhichOneof("body") in ("group", "chunk")]
    data, at = body(b"".join(holder.data for holder in holders)), 0
    for holder in holders:
        size = len(holder.data)
        holder.data, at = data[at : at + size], at + size
    return sealed(parsed)


def sealed(frames: Sequence[pb.Frame]) -> list[bytes]:
    """The frames as bytes, every sequence number, checksum and digest made right."""
    digest, made = blake3(), []
    for number, frame in enumerate(frames):
        frame.sequence = number
        kind = frame.WhichOneof("body")
        held = getattr(frame, kind)
        if kind in ("group", "chunk"):
            held.crc32c = google_crc32c.value(held.data)
        elif kind in ("segment_end", "end"):
            held.digest = digest.digest()
        made.append(frame.SerializeToString())
        digest.update(made[-1])
    return made
