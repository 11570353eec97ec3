"""Blocking work for an event loop, in threads that are waited for: nothing outlives its caller.

Does not know: what is generated. Place on the path: between the model and the services.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


async def to_thread(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a thread. When cancelled it waits for the thread: that cannot be stopped
    half-way, and what it uses must stay until it is done."""
    return await finished(asyncio.to_thread(work, *arguments))


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; when cancelled, however often, only after it has come to its end.

    What it then raises is nobody's any more, and is dropped.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # asked for, or the loop would log it as never retrieved
        raise


async def stream(make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """The items of `make()`, produced in a thread. Leaving early stops the thread at its next item."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()
    gone = threading.Event()

    def tell(item: Any) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:  # the loop has closed: nobody listens any more
            gone.set()

    def work() -> None:
        try:
            for item in make():
                if gone.is_set():
                    return
                tell(item)
            tell(_END)
        except Exception as error:  # whatever it is belongs to the reader
            tell(error)

    thread = loop.run_in_executor(None, work)
    try:
        while (item := await queue.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        gone.set()
        if not thread.done():
            await asyncio.shield(thread)
