"""Defaults that more than one room needs; the bounds of agents are in `agent.settings`.

Does not know: what any of them does. Place on the path: ground floor, so that the command line can show
them without loading what uses them.
"""

from __future__ import annotations

MODEL = "kvlink-tiny"
"""The embedded model."""
DEVICE, DTYPE, ATTENTION = "cpu", "auto", "auto"

SENDER, RECEIVER = "127.0.0.1:50051", "127.0.0.1:50052"
"""Where agents listen, and where the command line looks for them."""

CALL_S = 600.0
"""Seconds that a call which does work may take."""
NEW_TOKENS = 48
"""Tokens of an answer where the caller names no number."""
CERTIFICATE_DAYS = 7.0

STUDY_QUESTIONS, STUDY_SEED = 200, 42
"""Of `kvlink eval`."""
