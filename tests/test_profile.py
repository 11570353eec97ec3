"""Profiles: the same bytes for the same texts, refused where they are not this model's or not a profile."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import CodecError, ContextError, IdentityError, IntegrityError
from kvlink.eval.profiling import make_profile
from kvlink.eval.questions import generated
from kvlink.model.calibrate import build_profile, rotation, units
from kvlink.model.loading import PROFILE_FILE, load, with_profile
from kvlink.model.prefill import prefill
from kvlink.profile import Profile
from kvlink.recipe import Target
from tests.conftest import ARCHITECTURES

TEXTS = [item.context for item in itertools.islice(generated(4, (6, 9)), 8)]


def build(lm) -> Profile:
    return build_profile(lm, TEXTS, lambda: None)


@pytest.fixture(scope="module")
def made(random_lm) -> Profile:
    return build(random_lm("qwen2", "bfloat16"))


def test_a_profile_survives_its_file(made):
    back = Profile.from_bytes(made.to_bytes())
    assert back.to_bytes() == made.to_bytes()
    assert back.digest == made.digest
    assert (back.fingerprint, back.about, back.quality) == (made.fingerprint, made.about, made.quality)
    for mine, theirs in zip((*made.keys, *made.values), (*back.keys, *back.values), strict=True):
        for name in ("mean", "synthesis", "spread"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_the_same_texts_give_the_same_bytes_in_any_process(tmp_path):
    files = []
    for threads in ("1", "2"):
        file = tmp_path / threads
        words = f"profile build kvlink-tiny -o {file} --n 3 --checks 2 --seed 5 --json".split()
        done = subprocess.run(
            [sys.executable, "-m", "kvlink", *words], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )  # fmt: skip
        assert json.loads(done.stdout)["texts"] == "3"
        files.append(file.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_has_a_rotation_that_leaves_keys_as_they_were_at_position_zero(
    random_lm, architecture
):
    """One token read at many positions: without their rotation its first-layer keys are all alike."""
    lm = random_lm(architecture, "float32")
    keys = []
    for place in (0, 7, 63):
        position = torch.tensor([place])
        cache = prefill(lm, [5] * 64, position) if "sliding" not in architecture else None
        if cache is None:
            pytest.skip("a sliding window counts tokens, not positions")
        layer = cache.layers[0]
        keys.append(rotation(lm, 64)[0].off(layer.keys.double(), layer.positions))
    assert torch.allclose(keys[0], keys[1], atol=1e-5)
    assert torch.allclose(keys[0], keys[2], atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("with_one", [False, True])
def test_every_architecture_travels_by_transform(random_lm, architecture, with_one):
    lm = random_lm(architecture, "bfloat16")
    if with_one:
        lm = replace(lm, profile=build(lm))
    sender, receiver = Sender(lm), Receiver(lm)
    context = sender.read(TEXTS[0])
    found = []
    for step in ("0.0312", "1"):
        transfer = sender.pack(context, "Who leads it?", f"transform={step}")
        assert ("basis=own" in transfer.receipt.recipe) is not with_one
        held = receiver.receive(transfer.frames)
        error = [
            float((a.keys.float() - b.keys.float()).norm() / a.keys.float().norm())
            for a, b in zip(context.cache.layers, held.cache.layers, strict=True)
        ]
        found.append((transfer.receipt.bits_per_element, max(error)))
    assert found[0][0] > found[1][0], "a finer step costs more"
    assert found[0][1] < found[1][1], "and errs less"
    fine = sender.pack(context, "Who leads it?", "transform=0.0312", Target(verify=True)).receipt.certificate
    assert fine.kl_mean < 1e-3
    assert fine.tokens >= fine.agreeing_tokens > 0


def test_a_basis_makes_messages_smaller_at_the_same_step(tiny):
    plain, context = Sender(replace(tiny, profile=None)), Sender(tiny).read(TEXTS[1])
    own = plain.pack(context, "", "transform=0.5").receipt.bits_per_element
    shared = Sender(tiny).pack(context, "", "transform=0.5").receipt.bits_per_element
    assert shared < 0.75 * own


def test_units_are_what_queries_and_projections_say(random_lm):
    lm = random_lm("qwen2", "float32")
    keys, values = units(lm)[1]
    module = lm.model.model.layers[1].self_attn
    columns = (
        module.o_proj.weight.detach().double().reshape(-1, 2, 2, 16).square().sum((0, 2)).sqrt().reshape(-1)
    )
    assert torch.allclose(values, 1 / columns)
    assert torch.equal(keys.reshape(2, 2, 8)[:, 0], keys.reshape(2, 2, 8)[:, 1]), "equal on rotary pairs"
    assert bool((keys > 0).all())


def test_another_models_profile_is_refused_by_name(random_lm, made, tmp_path):
    other = random_lm("qwen2", "bfloat16", 1)
    with pytest.raises(IdentityError, match="the profile is another model's: weights"):
        made.require_match(other.fingerprint)
    with pytest.raises(IdentityError, match="another model's"):
        Receiver(other).add_profile(made.to_bytes())
    file = tmp_path / "x.profile"
    file.write_bytes(made.to_bytes())
    with pytest.raises(IdentityError, match="another model's"):
        with_profile(other, file)


def test_a_profile_in_a_models_folder_is_used_and_checked(checkpoint, made, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2", "bfloat16"), folder)
    (folder / PROFILE_FILE).write_bytes(made.to_bytes())
    assert load(str(folder)).profile.digest == made.digest
    (folder / PROFILE_FILE).write_bytes(made.to_bytes()[:-3])
    with pytest.raises(CodecError, match="not a profile"):
        load(str(folder))


def test_a_receiver_takes_no_profile_of_another_shape(random_lm, made):
    receiver = Receiver(random_lm("qwen2", "bfloat16"))
    assert receiver.read_profile(made.to_bytes()).digest == made.digest
    shape = replace(made, keys=made.keys[:2], values=made.values[:2])
    with pytest.raises(IdentityError, match="2 layers"):
        receiver.read_profile(shape.to_bytes())


def test_quality_is_measured_on_questions_that_the_statistics_have_not_seen(tiny):
    items = list(itertools.islice(generated(8, (6, 9)), 10))
    found = make_profile(replace(tiny, profile=None), [i.context for i in items[:6]], items[6:], lambda: None)
    shares = dict(found.quality)
    assert set(shares) == set(range(-8, 9))
    assert shares[-8] >= 0.85
    assert shares[-8] >= shares[8]


def test_no_texts_make_no_profile(tiny):
    with pytest.raises(ContextError, match="got none"):
        build_profile(tiny, [], lambda: None)


def _damaged(made: Profile) -> dict[str, bytes]:
    data = made.to_bytes()
    tensors = safetensors.torch.load(data)
    size = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + size])["__metadata__"]

    def again(change: dict, told: dict = told) -> bytes:
        return safetensors.torch.save({**tensors, **change}, told)

    return {
        "empty": b"",
        "text": b"not a profile at all",
        "cut": data[:-1],
        "header too long": (2**40).to_bytes(8, "little") + data[8:],
        "no metadata": safetensors.torch.save(tensors),
        "another format": again({}, {"kvlink": told["kvlink"].replace("profile/1", "profile/9")}),
        "a nan": again({"0.keys.mean": torch.full_like(tensors["0.keys.mean"], torch.nan)}),
        "a wrong shape": again({"0.keys.mean": tensors["0.keys.mean"][:-1].clone()}),
        "a wrong dtype": again({"0.keys.synthesis": tensors["0.keys.synthesis"].float()}),
        "a flat basis": again({"0.keys.synthesis": tensors["0.keys.synthesis"][0].clone()}),
        **{f"a quality of {pair}": again({}, {"kvlink": _with(told["kvlink"], quality=f"[{pair}]")})
           for pair in ("[1e400, 1]", "[-1e400, 1]", "[Infinity, 1]", "[NaN, 1]", "[1, NaN]", "[1, 1e400]", "[1, -0.1]",
                        "[41, 1]", "[1, 1.5]", "[1.0, 1]", "[1]", "[1, 1, 1]", "[[1], 1]", "1")},
        "layers of many digits": again({}, {"kvlink": _with(told["kvlink"], layers="9" * 5000)}),
        "a list without end": again({}, {"kvlink": _with(told["kvlink"], about="[" * 100_000)}),
        "one more": again({"9.keys.mean": torch.zeros(3)}),
    }  # fmt: skip


def _with(told: str, **fields: str) -> str:
    return json.dumps({**json.loads(told), **fields}, sort_keys=True)


def test_a_header_of_megabytes_is_refused_before_it_is_parsed():
    listed = b'{"__metadata__": [' + b"0," * 500_000 + b"0]}"
    with pytest.raises(CodecError, match="its header does not fit"):
        Profile.from_bytes(len(listed).to_bytes(8, "little") + listed)


def test_damaged_profiles_are_refused(made):
    for name, data in _damaged(made).items():
        with pytest.raises(CodecError):
            Profile.from_bytes(data)
            pytest.fail(name)


@settings(max_examples=300)
@given(st.data())
def test_any_changed_byte_is_refused(made, data):
    """The codecs trust a profile: its file has a checksum of its own."""
    whole = bytearray(made.to_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.one_of(st.sampled_from([1 << bit for bit in range(8)]), st.integers(1, 255)))
    with pytest.raises((CodecError, IntegrityError)):
        Profile.from_bytes(bytes(whole))


@given(st.binary(max_size=300))
def test_garbage_is_no_profile(data):
    with pytest.raises(CodecError):
        Profile.from_bytes(data)
