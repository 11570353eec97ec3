"""The handshake: what two agents say of themselves against what a transfer needs, before anything is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvlink.agent import handshake
from kvlink.agent.handshake import Needed, compare, needed_by
from kvlink.errors import IdentityError, KvlinkError, LimitError, RecipeError, RemoteProtocolError
from kvlink.payload import Fingerprint
from kvlink.receipt import Capabilities, Spoken
from kvlink.recipe import Recipe
from kvlink.sketch import Sketch
from kvlink.v1 import common_pb2
from tests.agent.conftest import TEXT

DIGEST = b"p" * 16
SKETCH = Sketch(1, (0,) * 10)
HERE = Capabilities(
    "a-model", Fingerprint(*(bytes([n]) * 16 for n in range(5))), "bfloat16", "0.1.0", sketch=SKETCH
)
THERE = replace(
    HERE,
    limits={
        "max_cache_bytes": 1_000, "max_context_tokens": 100, "max_frame_bytes": 500, "max_segments": 2,
        "max_text_bytes": 400, "max_new_tokens": 30, "max_profile_bytes": 10_000,
    },
)  # fmt: skip
FULL = Needed(
    "kv", codecs=("quantized", "transform"), coders=("identity", "zstd", "rans"), segments=2, calibration=DIGEST,
    profile_bytes=10_000, context_tokens=100, cache_bytes=1_000, frame_bytes=500, text_bytes=400, new_tokens=30,
)  # fmt: skip


def spoken(**changed: object) -> Capabilities:
    return replace(THERE, spoken=replace(THERE.spoken, **changed))


def test_what_fits_to_the_last_byte_passes():
    compare(HERE, THERE, FULL)
    compare(THERE, HERE, FULL)
    compare(HERE, replace(THERE, limits={}), replace(FULL, cache_bytes=10**15))


PAIRS: dict[str, tuple[Capabilities, Needed, type[KvlinkError], str]] = {
    "a newer protocol": (
        spoken(protocol_min=2, protocol_max=3), FULL, RemoteProtocolError,
        "protocol: 1 here, 2 to 3 at the peer; this side needs a newer release",
    ),
    "an older one": (
        spoken(protocol_min=0, protocol_max=0), FULL, RemoteProtocolError,
        "protocol: 1 here, 0 at the peer; the peer needs a newer release",
    ),
    "a range upside down": (spoken(protocol_min=3, protocol_max=1), FULL, RemoteProtocolError, "protocol: 1 here"),
    "no mode at all": (spoken(modes=()), FULL, RecipeError, "mode kv: here kv, text, at the peer none"),
    "text alone": (spoken(modes=("text",)), FULL, RecipeError, "mode kv: here kv, text, at the peer text"),
    "no transform": (spoken(codecs=("quantized",)), FULL, RecipeError, "codec transform: here .*, at the peer quantized"),
    "no rans": (
        spoken(coders=("identity", "zstd")), FULL, RecipeError, "coder rans: here .*, at the peer identity, zstd",
    ),
    "other weights": (
        replace(THERE, fingerprint=replace(THERE.fingerprint, weights=b"w" * 16)), FULL, IdentityError,
        "weights differ: here 0000.*, at the peer 7777",
    ),
    "another dtype": (replace(THERE, dtype="float32"), FULL, IdentityError, "dtype: here bfloat16, at the peer float32"),
    "no sketch": (replace(THERE, sketch=None), FULL, IdentityError, "tells no sketch"),
    "a calibration that nobody has": (
        THERE, replace(FULL, profile_bytes=0), IdentityError, "neither at the peer nor here; use basis=own",
    ),
    **{
        name: (THERE, replace(FULL, **{name: getattr(FULL, name) + 1}), LimitError, words)
        for name, words in (
            ("context_tokens", "a context of 101 tokens, the receiver takes at most 100: .* --max-context-tokens"),
            ("cache_bytes", "a cache of 1,001 bytes, the receiver takes at most 1,000: .* its --max-cache"),
            ("frame_bytes", "a frame of 501 bytes, the receiver takes at most 500: .* its --max-frame"),
            ("segments", "3 segments, the receiver takes at most 2: leave out rest=, or raise its --max-segments"),
            ("text_bytes", "a text of 401 bytes, the receiver takes at most 400: .* its --max-text"),
            ("new_tokens", "an answer of 31 tokens, the receiver takes at most 30: .* its --max-new-tokens"),
            ("profile_bytes", "a profile of 10,001 bytes, the receiver takes at most 10,000: use basis=own"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_what_does_not_fit_is_said_with_both_values_and_what_to_change(name):
    there, needed, error, words = PAIRS[name]
    with pytest.raises(error, match=words):
        compare(HERE, there, needed)


def test_every_limit_that_is_advertised_is_compared():
    advertised = {field.name for field in common_pb2.Limits.DESCRIPTOR.fields}
    assert {limit for limit, *_ in handshake._LIMITS.values()} == advertised == set(THERE.limits)


def test_a_calibration_that_is_there_need_not_be_sent():
    compare(HERE, replace(THERE, profiles=(DIGEST,)), replace(FULL, profile_bytes=10**9))


def test_text_needs_the_same_tokenizer_and_no_more():
    there = replace(
        THERE, dtype="float32", sketch=None, fingerprint=replace(THERE.fingerprint, weights=b"w" * 16)
    )
    compare(HERE, there, Needed("text", coders=("zstd",)))
    other = replace(there, fingerprint=replace(there.fingerprint, tokenizer=b"t" * 16))
    with pytest.raises(IdentityError, match="tokenizer differ"):
        compare(HERE, other, Needed("text"))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("int8", Needed("kv", ("quantized",), ("identity", "zstd"), 1)),
        ("svd=4", Needed("kv", ("low_rank",), ("identity", "zstd"), 1)),
        ("transform=1 basis=own", Needed("kv", ("transform",), ("identity", "rans", "zstd"), 1)),
        ("transform=1", Needed("kv", ("transform",), ("identity", "rans", "zstd"), 1)),
        (f"transform=1 basis={DIGEST.hex()}", Needed("kv", ("transform",), ("identity", "rans", "zstd"), 1, DIGEST)),
        ("q2c@0.5 transform=1 basis=own rest=4", Needed("kv", ("transform",), ("identity", "rans", "zstd"), 2)),
        ("text", Needed("text", (), ("zstd",), 1)),
        ("auto", Needed()),
        ("", Needed()),
    ],
)  # fmt: skip
def test_what_a_recipe_says_of_its_transfer(recipe, expected):
    assert needed_by(recipe) == expected
    if recipe not in ("", "auto"):
        assert needed_by(Recipe.parse(recipe)) == expected


def test_sizes_are_those_of_the_whole_context():
    assert Needed("text").sized(7, 900, "äb", 64) == Needed("text", context_tokens=7, text_bytes=3)
    assert Needed("kv").sized(7, 900, "ab", 64) == Needed(
        "kv", context_tokens=7, cache_bytes=900, frame_bytes=64
    )


LIMITED = {
    "max_context_tokens": ({"max_context_tokens": 20}, "int8", "the receiver takes at most 20"),
    "max_cache_bytes": ({"max_cache_bytes": 1000}, "int8", "the receiver takes at most 1,000"),
    "max_frame_bytes": ({"max_frame_bytes": 1000}, "int8", "the receiver takes at most 1,000"),
    "max_segments": (
        {"max_segments": 1},
        "q2c@0.5 transform=1 basis=own rest=4",
        "the receiver takes at most 1",
    ),
    "max_text_bytes": ({"max_text_bytes": 100}, "text", "the receiver takes at most 100"),
}


@pytest.mark.parametrize("name", LIMITED)
async def test_a_delivery_that_its_receiver_cannot_take_is_refused_before_prefill(pair, monkeypatch, name):
    limits, recipe, words = LIMITED[name]
    pair.receiver.settings = replace(pair.receiver.settings, **limits)
    monkeypatch.setattr(pair.sender._sender, "prefill", lambda *_: pytest.fail("it was read"))
    with pytest.raises(LimitError, match=words):
        await pair.deliver(recipe)


async def test_a_published_context_too_before_it_is_packed(pair, monkeypatch):
    published = await pair.source.publish(TEXT)
    pair.receiver.settings = replace(pair.receiver.settings, max_cache_bytes=1000)
    monkeypatch.setattr(pair.sender._sender, "pack", lambda *_: pytest.fail("it was packed"))
    with pytest.raises(LimitError, match="the receiver takes at most 1,000"):
        await pair.deliver("int8", context_id=published.context_id)


async def test_a_receiver_of_another_release_is_refused_before_prefill(pair, monkeypatch):
    there = pair.receiver.capabilities()
    monkeypatch.setattr(pair.receiver, "capabilities", lambda: replace(there, spoken=Spoken(2, 2)))
    monkeypatch.setattr(pair.sender._sender, "prefill", lambda *_: pytest.fail("it was read"))
    with pytest.raises(RemoteProtocolError, match="protocol: 1 here, 2 at the peer"):
        await pair.deliver("int8")
