"""Work that is waited for: nothing outlives its caller, and nothing is left for the loop to complain about."""

from __future__ import annotations

import asyncio
import gc

from kvlink.agent.threads import finished


async def test_work_that_fails_after_its_caller_is_gone_leaves_no_complaint():
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told["message"]))
    go_on, begun = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go_on.wait()
        raise ValueError("nobody is there to hear this")

    caller = asyncio.create_task(finished(work()))
    await begun.wait()
    caller.cancel()
    go_on.set()
    assert (await asyncio.gather(caller, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    del caller
    gc.collect()
    assert complaints == []


async def test_a_caller_that_is_cancelled_twice_still_waits():
    go_on, begun, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go_on.wait()
        ended.set()

    caller = asyncio.create_task(finished(work()))
    await begun.wait()
    for _ in range(2):
        caller.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
    assert not caller.done(), "what it uses must stay until the work is done"
    go_on.set()
    await asyncio.gather(caller, return_exceptions=True)
    assert ended.is_set()
