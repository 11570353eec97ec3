"""A first thousand of the mutations that `make faults` tries."""

from __future__ import annotations

from kvlink.agent.sender import Sender
from tests.faults import mutations


def test_no_mutation_gives_a_wrong_cache_another_exception_or_a_hang(tiny):
    report = mutations.run(Sender(tiny, chunk_bytes=2000), 800, seed=1)
    assert report.wrong == []
    assert report.other == []
    assert report.tried == report.refused + report.identical == 800
    assert report.refused > 700, "most damage is seen"
    assert report.grown_bytes < 100_000_000
