"""The transform codec: errors within half a step where they matter, no clipping, no dependence on anything."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink.cache import KVCache, LayerCache, full_positions
from kvlink.compress.codecs import CodecContext
from kvlink.errors import CodecError, RecipeError
from kvlink.model.rotary import Rotation
from kvlink.payload import Fingerprint
from kvlink.profile import Profile, make_side
from kvlink.recipe import Recipe
from tests.segments import decoded, encoded, there_and_back

MARKS = Fingerprint(*(bytes([i]) * 16 for i in range(5)))


def turns(tokens: int, size: int, layers: int) -> tuple[Rotation, ...]:
    """A rotary embedding of `size` channels."""
    speed = 0.5 ** torch.arange(size // 2, dtype=torch.float32)
    angle = torch.arange(tokens)[:, None] * speed[None]
    first = torch.arange(size // 2)
    return (Rotation(angle.cos(), angle.sin(), first, first + size // 2),) * layers


def known(tokens: int, heads: int, size: int, layers: int, profile: Profile | None = None) -> CodecContext:
    ones = torch.ones(heads * size, dtype=torch.float64)
    return CodecContext(turns(tokens, size - size % 2, layers), profile, ((ones, ones),) * layers)


def cache(tokens=40, heads=2, size=8, layers=2, dtype=torch.float32, seed=0, spread=1.0) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        keys, values = (spread * torch.randn(heads, tokens, size, generator=generator) for _ in range(2))
        made.append(LayerCache((keys + 3).to(dtype), values.to(dtype), full_positions(heads, tokens)))
    return KVCache(tuple(made), tokens)


def profile_of(full: KVCache, blocks: int) -> Profile:
    """A profile with random orthogonal bases."""
    heads, _, size = full.layers[0].keys.shape
    generator = torch.Generator().manual_seed(1)
    sides = []
    for _ in range(2 * len(full.layers)):
        width = heads * size // blocks
        bases = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(blocks)]
        sides.append(
            make_side(torch.randn(heads * size, generator=generator), bases, torch.ones(heads * size))
        )
    count = len(full.layers)
    return Profile(MARKS, tuple(sides[:count]), tuple(sides[count:]), {})


@pytest.mark.parametrize("step", [0.0625, 0.25, 1.0])
def test_without_a_profile_an_error_is_at_most_half_a_step(step):
    full, what = cache(), known(40, 2, 8, 2)
    back = there_and_back(full, Recipe.parse(f"transform={step} basis=own"), what)
    for layer, found in zip(full.layers, back.layers, strict=True):
        error = what.rotation[0].off(layer.keys.double() - found.keys.double(), layer.positions)
        assert error.abs().max() <= step / 2 * 1.0001 + 1e-5, "of keys without their rotation"
        relative = (layer.values - found.values).abs().max() / layer.values.std()
        assert relative <= step / 2 * 1.2, "of values, relative to their size"


@pytest.mark.parametrize("blocks", [1, 2])
def test_with_a_profile_an_error_is_at_most_half_a_step_in_its_basis(blocks):
    full = cache()
    profile = profile_of(full, blocks)
    what = known(40, 2, 8, 2, profile)
    recipe = Recipe.parse(f"transform=0.5 basis={profile.digest.hex()}")
    back = there_and_back(full, recipe, what)
    for index, (layer, found) in enumerate(zip(full.layers, back.layers, strict=True)):
        error = (layer.values.double() - found.values.double()).transpose(0, 1)
        rows = error.reshape(40, blocks, -1).transpose(0, 1)
        coefficients = torch.einsum("bkc,bdc->bkd", rows, profile.values[index].analysis)
        assert coefficients.abs().max() <= 0.25 * 1.001


def test_a_rotation_comes_off_and_goes_on_again():
    keys = torch.randn(2, 30, 8, dtype=torch.float64)
    places = full_positions(2, 30)
    (turn,) = turns(30, 6, 1)
    assert torch.allclose(turn.on(turn.off(keys, places), places), keys)
    assert torch.equal(turn.off(keys, places)[..., 6:], keys[..., 6:]), (
        "channels beyond the rotated ones stay"
    )
    scaled = replace(turn, cosine=1.3 * turn.cosine, sine=1.3 * turn.sine)
    assert torch.allclose(scaled.off(scaled.on(keys, places), places), keys), "a scaling too"


def test_kept_positions_keep_their_own_rotation():
    full, what = cache(), known(40, 2, 8, 2)
    kept = full.select(torch.tensor([0, 3, 17, 39]))
    recipe = Recipe.parse("q2c@0.1 transform=0.01 basis=own")
    back = there_and_back(kept, recipe, what)
    for layer, found in zip(kept.layers, back.layers, strict=True):
        assert torch.equal(layer.positions, found.positions)
        assert torch.allclose(layer.keys, found.keys, atol=0.01)


def test_a_rest_is_coarse_and_the_chosen_are_fine():
    full, what = cache(), known(40, 2, 8, 2)
    fine = torch.tensor([0, 5, 6, 30])
    recipe = Recipe.parse("q2c@0.1 transform=0.125 rest=2 basis=own")
    chosen, others = encoded(full, recipe, what, fine)
    assert (chosen.header.kept, chosen.header.map_sets) == (4, 1)
    assert (others.header.kept, others.header.map_sets) == (36, 0), "what is left needs no map"
    back = decoded([chosen, others], full.shape, what)
    for layer, found in zip(full.layers, back.layers, strict=True):
        error = (layer.keys - found.keys).abs().amax((0, 2))
        others = torch.tensor([i for i in range(40) if i not in fine.tolist()])
        assert error[fine].max() < 0.13
        assert 0.3 < error[others].max() < 2
        assert found.keys.shape == layer.keys.shape, "all positions are there"


@settings(max_examples=40)
@given(
    st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([1e-4, 1.0, 300.0]), st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_any_shape_any_size_any_dtype_comes_back_finite(tokens, heads, size, dtype, spread, outlier, seed):
    kind = getattr(torch, dtype)
    full = cache(tokens, heads, size, 1, torch.float32, seed, spread)
    if outlier:
        full.layers[0].keys[0, -1, 0] = 1e4
        full.layers[0].values[-1, 0, -1] = -1e4
    layer = full.layers[0]
    full = KVCache((LayerCache(layer.keys.to(kind), layer.values.to(kind), layer.positions),), tokens)
    back = there_and_back(
        full, Recipe.parse("transform=0.125 basis=own"), known(tokens, heads, size, 1)
    ).layers[0]
    for found in (back.keys, back.values):
        assert found.dtype == kind
        assert bool(found.isfinite().all())
    if outlier:
        assert float(back.keys[0, -1].float().norm()) == pytest.approx(1e4, rel=0.05), "escaped, not clipped"
        assert float(back.values[-1, 0, -1]) == pytest.approx(-1e4, rel=0.05)


def test_the_bytes_do_not_hang_on_the_caches_dtype():
    narrow = cache(dtype=torch.bfloat16)
    wide = KVCache(
        tuple(LayerCache(x.keys.float(), x.values.float(), x.positions) for x in narrow.layers), narrow.tokens
    )
    recipe, what = Recipe.parse("transform=0.5 basis=own"), known(40, 2, 8, 2)
    assert encoded(narrow, recipe, what) == encoded(wide, recipe, what)


PROCESS = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, ".")
from blake3 import blake3
from tests.compress.test_transform import cache, known
from kvlink.profile import Profile
from tests.segments import decoded, encoded
from kvlink.recipe import Recipe
full = cache(400, 4, 64, 2)
profile = Profile.from_bytes(open(sys.argv[2], "rb").read())
what = known(400, 4, 64, 2, profile)
total = blake3()
for basis in ("own", profile.digest.hex()):
    recipe = Recipe.parse(f"transform=0.7 basis={basis}")
    segments = encoded(full, recipe, what)
    for group in segments[0].groups:
        for part in group.parts:
            total.update(part.data)
    for layer in decoded(segments, full.shape, what).layers:
        total.update(layer.keys.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
print(total.hexdigest())
"""


def test_processes_and_thread_counts_agree_to_the_byte(tmp_path):
    file = tmp_path / "profile"
    file.write_bytes(profile_of(cache(400, 4, 64, 2), 1).to_bytes())
    found = {
        subprocess.run(
            [sys.executable, "-c", PROCESS, str(threads), str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 3)
    }
    assert len(found) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    full = cache()
    full.layers[1].values[0, 0, 0] = bad
    with pytest.raises(CodecError, match="layer 1 values: a number is not finite"):
        encoded(full, Recipe.parse("transform=1 basis=own"), known(40, 2, 8, 2))


def test_a_step_that_is_too_fine_is_refused():
    full = cache()
    full.layers[0].values[0, 0, 0] = 1e30
    with pytest.raises(CodecError, match="layer 0 .*: .*fine"):
        encoded(full, Recipe.parse("transform=0.001 basis=own"), known(40, 2, 8, 2))


def test_a_profile_that_is_not_here_is_refused():
    full = cache()
    profile = profile_of(full, 1)
    recipe = Recipe.parse(f"transform=1 basis={profile.digest.hex()}")
    segments = encoded(full, recipe, known(40, 2, 8, 2, profile))
    for other in (None, profile_of(cache(layers=2, seed=9), 2)):
        with pytest.raises(RecipeError, match=f"needs profile {profile.digest.hex()[:12]}, here is"):
            decoded(segments, full.shape, known(40, 2, 8, 2, other))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transform=0", "from 1/1024 to 1024"),
        ("transform=nan", "from 1/1024 to 1024"),
        ("transform=big", "must be a step"),
        ("transform=1 int4", "'int4' goes with quantizers, not with transform"),
        ("transform=1 svd=4", "'transform=1' goes with transform, not with svd"),
        ("basis=own", "'basis=own' goes with transform"),
        ("rest=2", "rest=2: a step goes with transform"),
        ("transform=1 basis=mine", "32 hex digits"),
        ("transform=1 rest=2", "rest needs a selection"),
        ("q2c@0.5 transform=1 rest=2 when=during", "rest needs a selection, made after"),
        ("q2c@0.5 transform=2 rest=1", "must not be finer"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "transform=1",
        "transform=0.297 basis=own",
        "q2c+draft@0.25 transform=0.5 rest=4",
        "snapkv@64tok transform=1.4142",
    ],
)
def test_recipes_keep_their_forms(text):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
