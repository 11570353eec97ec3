"""Break-even: the link rate at which cache and text arrive together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.errors import ConfigError
from kvlink.plan import break_even


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.floats(1e-3, 100), st.floats(0, 100))
def test_at_the_break_even_rate_both_take_the_same_time(cache_bytes, text_bytes, read_s, decode_s):
    told = break_even(cache_bytes, text_bytes, read_s, decode_s)
    if told.rate_bps is None:
        assert read_s <= decode_s
    elif told.rate_bps == 0:
        assert cache_bytes <= text_bytes
    else:
        text_s = 8 * text_bytes / told.rate_bps + read_s
        cache_s = 8 * cache_bytes / told.rate_bps + decode_s
        assert cache_s == pytest.approx(text_s, rel=1e-6)


def test_negative_figures_are_refused():
    with pytest.raises(ConfigError):
        break_even(-1, 0, 0.0, 0.0)
