"""Frames leave while later layers are still to be coded, and packing takes no more memory than a few layers."""

from __future__ import annotations

import importlib.util
import io
import threading
from pathlib import Path
from types import ModuleType

import pytest

from kvlink.agent.receiver import Intake, Receiver
from kvlink.agent.sender import Sender
from kvlink.compress import codec
from kvlink.errors import CodecError
from tests.agent.conftest import QUESTION, TEXT

PACKING = Path(__file__).parents[2] / "benchmarks" / "packing.py"


class Coding:
    """Counts the layers that are coded; `hold` keeps the last one until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.layers: list[int] = []
        self.hold = threading.Event()
        encode = codec._encode_layer

        def gated(layer, index, *rest):
            if index == last:
                assert self.hold.wait(60)
            self.layers.append(index)
            return encode(layer, index, *rest)

        monkeypatch.setattr(codec, "_encode_layer", gated)


@pytest.mark.parametrize("recipe", ["raw", "int4", "q2c@0.5 int8", "transform=1"])
async def test_the_first_layer_is_at_the_receiver_before_the_last_one_is_coded(pair, monkeypatch, recipe):
    layers = len(pair.sender._sender.lm.model.model.layers)
    coding = Coding(monkeypatch, layers - 1)
    take = Intake.take

    def seen(intake, frame):
        take(intake, frame)
        if intake.session.next_sequence >= 3:  # manifest, header, the first layer's first bytes
            coding.hold.set()

    monkeypatch.setattr(Intake, "take", seen)
    done = await pair.deliver(recipe)
    assert coding.layers == list(range(layers)), "each layer once"
    assert await pair.answer(done.cache_id)


async def test_a_budget_waits_for_all_of_it_and_still_arrives(pair):
    done = await pair.deliver("q2c@9kB int4")
    assert done.receipt.wire_bytes <= 9000


def test_what_is_streamed_to_a_file_is_the_transfer_and_is_not_kept(random_lm):
    sender = Sender(random_lm("qwen2", "bfloat16"))
    context = sender.read(TEXT)
    kept, streamed = (sender.pack(context, QUESTION, "q2c@0.5 int8", transfer_id=bytes(16)) for _ in range(2))
    out = io.BytesIO()
    with pytest.raises(CodecError, match="when its last frame was read"):
        frames = streamed.stream()
        next(frames)
        _ = streamed.receipt
    for _ in frames:
        pass
    assert streamed.receipt.bytes == kept.receipt.bytes
    with pytest.raises(CodecError, match="are not kept"):
        _ = streamed.frames
    count = kept.write(out)
    assert count == len(out.getvalue())
    assert kept.frames
    out.seek(0)
    receiver = Receiver(sender.lm)
    assert receiver.answer(receiver.read_file(out), QUESTION).text


def test_a_transfer_is_packed_with_its_last_frame(random_lm):
    """A receiver may say that it is complete before anybody asks for a frame behind it."""
    sender = Sender(random_lm("qwen2", "bfloat16"))
    context = sender.read(TEXT)
    count = len(sender.pack(context, QUESTION, "int8").frames)
    transfer = sender.pack(context, QUESTION, "int8")
    assert transfer.frame(count - 2) and not transfer.is_packed
    assert transfer.frame(count - 1) and transfer.is_packed
    assert transfer.frame(count) is None and transfer.receipt.wire_bytes


def test_before_it_is_packed_a_transfer_says_the_most_that_it_can_be(random_lm):
    sender = Sender(random_lm("qwen2", "bfloat16"))
    context = sender.read(TEXT)
    recipes = (
        "text",
        "raw",
        "int4",
        "int1 svd=4",
        "q2c@0.3 int4 layers=0:int8",
        "q2c@0.25 transform=1 rest=4",
    )
    for recipe in recipes:
        transfer = sender.pack(context, QUESTION, recipe)
        most = transfer.most_bytes
        size = sum(map(len, transfer.frames))
        assert size <= most, recipe
        assert transfer.most_bytes == size


@pytest.fixture(scope="module")
def packing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packing", PACKING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["raw", "int4"])
def test_packing_takes_no_more_memory_than_four_layers_beside_the_cache(packing, recipe):
    row = packing.in_a_process(recipe, 4096)
    assert row["wire_bytes"] > 10_000_000
    assert row["peak_bytes"] <= row["four_layers_bytes"]
