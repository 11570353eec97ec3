"""The one limit of tests that wait: it ends a test that hangs, and decides nothing else.

A test waits for what it is about: a line, an event, the end of a process. Machines stall, so that a limit
says nothing about the code; `KVLINK_TEST_PATIENCE` makes it longer or shorter.
"""

from __future__ import annotations

import os

HANGS_S = 900.0 * float(os.environ.get("KVLINK_TEST_PATIENCE", "1"))
"""Seconds after which a wait is given up."""
