"""Numbers that are none: refused where a cache arrives, and never a reason to fall over."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.compress.lossless import unpack_part
from kvlink.errors import CodecError, ContextError, DataError, ModelError
from kvlink.model.generate import generate
from kvlink.payload import Part
from kvlink.wire.session import SendSession, read_transfer
from tests.agent.conftest import QUESTION, TEXT

WRONG = {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "-inf": b"\x80\xff"}  # bfloat16, little endian


@pytest.fixture
def sender(random_lm) -> Sender:
    return Sender(random_lm("qwen2", "bfloat16"))


def forged(sender: Sender, recipe: str, change) -> list[bytes]:
    """A transfer whose checksums are right and one of whose tensors was put through `change(parts)`."""
    transfer = sender.pack(sender.read(TEXT), QUESTION, recipe)
    manifest, (segment,) = read_transfer(transfer.frames)
    groups = list(segment.groups)
    at = len(groups) // 2
    half = len(groups[at].parts) // 2
    parts = (*change(list(groups[at].parts[:half])), *groups[at].parts[half:])  # of its keys
    groups[at] = replace(groups[at], parts=parts)
    return list(SendSession(manifest).transfer([replace(segment, groups=tuple(groups))]))


def put(part: Part, at: int, data: bytes) -> Part:
    plain = part.data[:at] + data + part.data[at + len(data) :]
    return Part(part.kind, "identity", len(plain), plain)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("where", [0, 1000, -2])
def test_a_raw_cache_with_one_number_that_is_none_is_refused(sender, name, where):
    def change(parts: list[Part]) -> list[Part]:
        at = where % parts[0].plain_bytes
        return [put(parts[0], at, WRONG[name])]

    with pytest.raises(CodecError, match="layer 2 keys: a number is not finite"):
        Receiver(sender.lm).receive(forged(sender, "raw", change))


@pytest.mark.parametrize("name", WRONG)
def test_a_lossless_cache_too(sender, name):
    """Byte planes: the first number's two bytes stand in two parts."""

    def change(parts: list[Part]) -> list[Part]:
        plain = [Part("codes", "identity", p.plain_bytes, unpack_part(p)) for p in parts]
        return [put(part, 0, WRONG[name][i : i + 1]) for i, part in enumerate(plain)]

    with pytest.raises(CodecError, match="layer 2 keys: a number is not finite"):
        Receiver(sender.lm).receive(forged(sender, "lossless", change))


@pytest.mark.parametrize("recipe", ["int8", "int4", "int2", "int1", "int8 svd=4", "transform=1 basis=own"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_minima_and_means_that_are_none_are_refused(sender, recipe, value):
    def change(parts: list[Part]) -> list[Part]:
        first = parts[0]
        assert first.kind == "scales"
        plain = Part("scales", "identity", first.plain_bytes, unpack_part(first))
        return [put(plain, 0, np.float16(value).tobytes()), *parts[1:]]

    with pytest.raises(CodecError, match="not finite"):
        Receiver(sender.lm).receive(forged(sender, recipe, change))


def test_scales_that_overflow_the_caches_dtype_are_refused(random_lm):
    """Finite on the wire, infinite once they are multiplied: 65504 times a code, in float16."""
    sender = Sender(random_lm("qwen2", "float16"))

    def change(parts: list[Part]) -> list[Part]:
        size = parts[0].plain_bytes
        return [Part("scales", "identity", size, np.full(size // 2, 65504, np.float16).tobytes()), parts[1]]

    with pytest.raises(CodecError, match="layer 2 keys: a number is not finite"):
        Receiver(sender.lm).receive(forged(sender, "int8", change))


def test_a_model_that_reads_nonsense_is_found_at_the_sender(sender, monkeypatch):
    from kvlink.agent import sender as module

    def broken(lm, ids, **options):
        cache = real(lm, ids)
        with torch.inference_mode():
            cache.layers[1].values[0, 0, 0] = math.inf
        return cache

    real = module.prefill
    monkeypatch.setattr(module, "prefill", broken)
    with pytest.raises(ModelError, match="layer 1 values: a number is not finite"):
        sender.read(TEXT)


TINY_TEMPERATURES = (1e-320, 5e-324, 1e-45, 1e-30, 1e-6)


@pytest.mark.parametrize("temperature", TINY_TEMPERATURES)
def test_a_tiny_temperature_is_greedy(sender, temperature):
    held = sender.read(TEXT)
    greedy = sender.answer(held, QUESTION, max_new_tokens=8)
    found = sender.answer(held, QUESTION, max_new_tokens=8, temperature=temperature)
    assert (found.token_ids, found.text) == (greedy.token_ids, greedy.text)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -math.inf, -1.0, 10.1, 1e308])
def test_a_temperature_out_of_range_is_input(sender, temperature):
    with pytest.raises(ContextError, match="temperature must be from 0 to 10"):
        sender.answer(sender.read(TEXT), QUESTION, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0, 10.0])
def test_finite_numbers_that_overflow_in_the_model_are_damage(sender, temperature):
    """What nobody can see before the model has read it: the largest numbers of the dtype."""
    held = sender.read(TEXT).cache
    with torch.inference_mode():
        for layer in held.layers:
            layer.keys.fill_(torch.finfo(torch.bfloat16).max)
            layer.values.fill_(torch.finfo(torch.bfloat16).max)
    with pytest.raises(DataError, match="logits are not finite"):
        list(generate(sender.lm, held, QUESTION, temperature=temperature))


def test_rounding_beyond_the_largest_number_stays_within(random_lm):
    """An honest float16 cache may hold the dtype's largest number; its quantizer rounds upwards."""
    from kvlink.cache import KVCache, LayerCache, full_positions
    from kvlink.recipe import Recipe
    from tests.segments import there_and_back

    largest = torch.finfo(torch.float16).max
    tensor = torch.randn(2, 16, 8).mul(1e4).clamp(-largest, largest).half()
    tensor[0, 0, 0], tensor[1, 3, 2] = largest, -largest
    cache = KVCache((LayerCache(tensor, tensor, full_positions(2, 16)),), 16)
    for text in ("int8", "int4", "int8/channel/g4/sym", "int4/token/g8/sym", "int2"):
        recipe = Recipe.parse(text)
        there_and_back(cache, recipe).require_finite()
