"""How the process of an agent ends: at any moment, within its time.

Does not know: what the agent does. Place on the path: around it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from kvlink.terminal import note

log = logging.getLogger("kvlink.agent")

_ENDED_BY_SIGTERM = 128 + signal.SIGTERM


def end_while_loading() -> None:
    """From now on SIGTERM ends the process at once, until a server takes the signal for itself.

    The first process of a container ignores a signal that it has no handler for. Nothing is on its way
    while a model loads, and its threads would not let an exception end them.
    """

    def end(number: int, frame: FrameType | None) -> None:
        note("kvlink: stopped before it served")
        os._exit(_ENDED_BY_SIGTERM)

    signal.signal(signal.SIGTERM, end)


def end_within(seconds: float) -> None:
    """End the process after that, whatever its threads do: a prefill cannot be stopped half-way.

    All calls have been told by then, and what was said to be durable is on disk.
    """

    def end() -> None:
        log.warning("work that did not end within %g s is left", seconds)
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
