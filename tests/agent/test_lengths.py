"""Texts, recipes and ids that are too long, to both agents over real gRPC: refused before any work, in few words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvlink.agent.sender_service import SenderService
from kvlink.agent.settings import SenderSettings
from kvlink.errors import BusyError, InputError, KvlinkError, LimitError
from kvlink.model.template import Template
from kvlink.model.tokens import Encoder
from kvlink.transport.api import Delivery, Fetch
from tests.agent.conftest import QUESTION, TEXT

LONG = "Jand Faris was born. " * 700_000
MANY_LAYERS = "int8 layers=" + ";".join(f"{i % 65536}:int4/channel/g64/asym" for i in range(100_000))


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """The longest text that was cut into tokens or put through a template."""
    seen = {"cut": 0, "rendered": 0}

    def watch(owner: Any, name: str, what: str, size: Callable[..., int]) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            seen[what] = max(seen[what], size(*arguments))
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(Encoder, "ids", "cut", lambda _, text, *__: len(text))
    watch(Template, "prompt", "rendered", lambda _, turns=(): sum(len(turn.content) for turn in turns))
    return seen


async def drain(items: Any) -> None:
    async for _ in items:
        pass


CALLS: dict[str, Callable[..., Any]] = {
    "publish: text": lambda p, _: p.source.publish(LONG),
    "publish: text of half characters": lambda p, _: p.source.publish("a\ud800" * 100),
    "publish: a turn": lambda p, _: p.source.publish(TEXT, turns=[("user", LONG)]),
    "publish: many turns": lambda p, _: p.source.publish(TEXT, turns=[("user", "word " * 20)] * 1000),
    "publish: turns without end": lambda p, _: p.source.publish(TEXT, turns=[("user", "")] * 5000),
    "publish: a role": lambda p, _: p.source.publish(TEXT, turns=[("x" * 1_000_000, "")]),
    "publish: readers": lambda p, _: p.source.publish(TEXT, readers=["x"] * 1000),
    "publish: a reader": lambda p, _: p.source.publish(TEXT, readers=["x" * 1_000_000]),
    "fetch: question": lambda p, c: drain(p.source.fetch(Fetch(c[0], LONG, "int8"))),
    "fetch: recipe": lambda p, c: drain(p.source.fetch(Fetch(c[0], QUESTION, MANY_LAYERS))),
    "fetch: id": lambda p, _: drain(p.source.fetch(Fetch("x" * 1_000_000, QUESTION, "int8"))),
    "fetch: transfer id": lambda p, c: drain(p.source.fetch(Fetch(c[0], "", "int8", transfer_id=b"x" * 9999))),
    "deliver: text": lambda p, _: p.deliver(text=LONG),
    "deliver: question": lambda p, _: p.deliver(question=LONG),
    "deliver: recipe": lambda p, _: p.deliver(MANY_LAYERS),
    "deliver: receiver": lambda p, _: p.deliver(receiver="127.0.0.1:" + "9" * 1_000_000),
    "unpublish: id": lambda p, _: p.source.unpublish("x" * 1_000_000),
    "generate: question": lambda p, c: p.answer(c[1], LONG),
    "generate: id": lambda p, _: p.answer("x" * 1_000_000),
    "status: id": lambda p, _: p.target.transfer_status(b"x" * 1_000_000),
    "delete: id": lambda p, _: p.target.delete_cache("x" * 1_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
async def test_what_is_too_long_is_refused_before_any_work(pair, work, name):
    held = (await pair.source.publish(TEXT)).context_id, (await pair.deliver("int8")).cache_id
    for what in work:
        work[what] = 0
    with pytest.raises((InputError, LimitError)) as caught:
        await CALLS[name](pair, held)
    assert len(str(caught.value)) < 2000
    most = pair.sender._sender.lm.text_bytes
    assert work["cut"] <= most
    assert work["rendered"] <= most
    assert await pair.answer(held[1]) is not None
    assert len(pair.sender.store) == 1


async def test_the_memory_of_a_text_is_promised_before_it_is_cut(random_lm, work):
    """A cache of this text would fit; the text and its tokens beside it do not."""
    from kvlink.agent.sender import Sender

    sender = Sender(random_lm("qwen2", "bfloat16"))
    text = "Maret. " * 70
    cut = sender.cut(text)
    needed = cut.cache_bytes
    work["cut"] = 0
    service = SenderService(sender, replace(SenderSettings(), max_held_bytes=needed + 1000))
    with pytest.raises((LimitError, BusyError)):
        await service.publish(text, 0, [])
    assert work["cut"] == 0
    assert service.store.reserved_bytes == 0
    roomy = SenderService(sender, replace(SenderSettings(), max_held_bytes=40 * needed))
    assert (await roomy.publish(text, 0, [])).context_tokens == len(cut.ids)
    assert roomy.store.reserved_bytes == 0


async def test_a_fetch_beyond_the_end_is_input(pair):
    published = await pair.source.publish(TEXT)
    fetch = Fetch(published.context_id, QUESTION, "int8", transfer_id=b"t" * 16)
    await drain(pair.sender.fetch_cache(fetch))
    with pytest.raises(InputError, match="frame 9999 of a transfer of"):
        await drain(pair.sender.fetch_cache(replace(fetch, next_sequence=9999)))


async def test_a_delivery_of_a_text_that_fits_still_works(pair):
    assert issubclass(InputError, KvlinkError)
    done = [p async for p in pair.source.deliver(Delivery(pair.target.address, QUESTION, "int8", text=TEXT))]
    assert done[-1].done
