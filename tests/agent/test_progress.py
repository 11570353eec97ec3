"""Who waits for a long context is told how far it is, and can give up."""

from __future__ import annotations

import pytest

from kvlink import pack
from kvlink.agent.sender import Sender
from kvlink.recipe import Target

TEXT = "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening."
QUESTION = "What instrument does Jand Faris play?"


class Seen(list):
    def __call__(self, stage: str, done: int, total: int) -> None:
        self.append((stage, done, total))


def test_reading_tells_every_layer(tiny):
    seen = Seen()
    context = Sender(tiny).read(TEXT, progress=seen)
    layers = len(context.cache.layers)
    assert seen == [("read", done, layers) for done in range(1, layers + 1)]
    Sender(tiny).read(TEXT)
    assert len(seen) == layers, "nobody is told of another's reading"


@pytest.mark.parametrize(
    ("recipe", "groups"), [("raw", 4), ("text", 1), ("q2c@0.5 int8", 5), ("q2c@0.5 int8 rest=int2", 9)]
)
def test_packing_tells_every_group(tiny, recipe, groups):
    sender, seen = Sender(tiny), Seen()
    context = sender.read(TEXT)
    told = pack(sender, context, QUESTION, recipe, progress=seen)
    assert seen == [("encode", done, groups) for done in range(1, groups + 1)]
    assert len(told) == len(pack(sender, context, QUESTION, recipe))


def test_it_is_told_as_frames_are_read(tiny):
    sender, seen = Sender(tiny), Seen()
    transfer = sender.pack(sender.read(TEXT), QUESTION, "raw", progress=seen)
    assert not seen
    for number in range(len(transfer.frames)):
        assert transfer.frame(number)
    assert len(seen) == 4


def test_a_search_for_a_size_tells_each_try(tiny):
    sender, seen = Sender(tiny), Seen()
    pack(sender, sender.read(TEXT), QUESTION, "q2c+draft@1.0 int8", Target(budget_bytes=20_000), seen)
    assert sum(done == 1 for _, done, _ in seen) > 1


def test_what_it_raises_ends_the_work(tiny):
    class EnoughError(Exception):
        pass

    def give_up(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise EnoughError

    sender = Sender(tiny)
    with pytest.raises(EnoughError):
        sender.read(TEXT, progress=give_up)
    context = sender.read(TEXT)
    with pytest.raises(EnoughError):
        pack(sender, context, QUESTION, "raw", progress=give_up)
    assert sender.answer(context, QUESTION).text == "cello"
