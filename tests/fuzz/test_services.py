"""Random messages of every type to running agents: a small share of what `make fuzz` sends."""

from __future__ import annotations

from tests.fuzz.services import SERVICES, run

MESSAGES = 2_000


async def test_random_messages_leave_agents_whole_and_honest_callers_answered(tmp_path):
    """No INTERNAL, no UNKNOWN, no traceback, no call without an end, a clean exit: see `tests.fuzz.services`."""
    found = await run(list(SERVICES), MESSAGES, 0, tmp_path, tmp_path / "faults")
    assert found["faults"] == []
    for kind in SERVICES:
        assert found[kind]["messages"] >= MESSAGES
        assert found[kind]["never_ok"] == [], (
            "these calls never got beyond a refusal: nothing behind it was tried"
        )
        assert found[kind]["honest_rounds"] > 0
