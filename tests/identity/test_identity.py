"""Fingerprint and probe refuse what alters a cache and accept what does not, field by field, over families."""

from __future__ import annotations

import pytest

from kvlink.errors import IdentityError
from kvlink.sketch import TOLERANCE
from tests.identity.changes import CHANGES, HARMLESS, SAME, caches_apart, pair
from tests.identity.same import apart, clothes, elsewhere, in_own_dtype, tuned

BEYOND_THE_PROBE = ("Mistral sliding_window 100 → 120",)
"""What only texts that are longer than the probe's show."""


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_field_that_alters_the_cache_is_refused_by_fingerprint_and_by_probe(change):
    one, two = pair(change)
    assert caches_apart(one, two) > SAME
    with pytest.raises(IdentityError, match="differ"):
        one.fingerprint.require_match(two.fingerprint, "kv")
    if str(change) in BEYOND_THE_PROBE:
        one.sketch.require_match(two.sketch)
        return
    with pytest.raises(IdentityError, match="probe: the caches of a fixed text differ"):
        one.sketch.require_match(two.sketch)


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_a_field_that_does_not_is_accepted_by_both(change):
    one, two = pair(change)
    assert caches_apart(one, two) <= SAME
    one.fingerprint.require_match(two.fingerprint, "kv")
    one.sketch.require_match(two.sketch)


def test_the_tables_are_as_long_as_they_say():
    assert len({str(change) for change in CHANGES}) >= 35
    assert len({change.family for change in CHANGES}) >= 15
    assert len({str(change) for change in HARMLESS}) >= 20


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2-sliding"])
def test_one_model_is_accepted_in_other_clothes(checkpoint, tmp_path, architecture):
    folder = str(checkpoint(architecture, "bfloat16"))
    seen = dict(clothes(folder, tmp_path))
    assert len(seen) == 7
    one = seen["1 thread"]
    for what, other in seen.items():
        assert other.fingerprint == one.fingerprint, what
        assert apart(one.sketch, other.sketch) <= TOLERANCE / 4, what


def test_one_model_is_accepted_from_another_processor(tiny):
    assert apart(tiny.sketch, elsewhere(tiny.name)) <= TOLERANCE / 4


def test_the_probe_alone_sees_a_fine_tune_of_a_thousandth(tiny):
    """Float16 and bfloat16 would hide it: that is why the probe widens."""
    found = [apart(tiny.sketch, sketch) for _, sketch in tuned(tiny)]
    assert [share > TOLERANCE for share in found] == [False, True, True, True, False, True]
    short = in_own_dtype(tiny, tiny.model.dtype, "eager")
    assert apart(tiny.sketch, short) > found[1]
