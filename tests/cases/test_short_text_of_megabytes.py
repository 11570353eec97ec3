"""2 kB that say they are 16 MB of text in 2,000 tokens: one message took a receiver minutes and gigabytes."""

from __future__ import annotations

import zstandard

from kvlink.v1 import wire_pb2 as pb
from tests.cases.peer import ended
from tests.forging import forged

PLAIN = b"Jand Faris was born in Nibo. " * 550_000


def test_a_text_that_cannot_be_so_few_tokens_is_refused_before_it_is_cut(network, source, honest):
    def declare(manifest: pb.Manifest) -> None:
        manifest.text_bytes = len(PLAIN)
        manifest.shape.tokens = 2000

    packed = zstandard.ZstdCompressor().compress(PLAIN)
    bomb = forged(honest("text"), declare, text=(pb.CODER_ZSTD, packed))
    assert sum(map(len, bomb)) < 3000
    source.push(forged(honest()))  # everything is loaded
    with network.beside(network.receiver) as others:
        status, why = ended(lambda: source.push(bomb))
    assert status in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), why
    others.require_unmoved()
