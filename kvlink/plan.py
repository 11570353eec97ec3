"""Planning: when the cache is faster than the text, in numbers only.

    text:  8 · text bytes / B + read seconds        cache:  8 · cache bytes / B + decode seconds

Above the break-even link rate B* the cache arrives before the text could be read; below it
sending the text is faster.

Does not know: models, tensors, sockets. Place on the path: before a recipe is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlink.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The link rate above which the cache is faster; None where no rate makes it so."""

    rate_bps: float | None
    reason: str


def break_even(cache_bytes: int, text_bytes: int, read_s: float, decode_s: float) -> BreakEven:
    """B* in bits per second, from bytes on the wire and seconds at the receiver.

    Raises ConfigError for negative figures.
    """
    if min(cache_bytes, text_bytes, read_s, decode_s) < 0:
        raise ConfigError("bytes and seconds must not be negative")
    saved_s = read_s - decode_s
    if saved_s <= 0:
        return BreakEven(
            None, f"reading the text takes {read_s * 1e3:.1f} ms, no longer than decoding the cache"
        )
    if cache_bytes <= text_bytes:
        return BreakEven(0.0, "the cache is no larger than the text")
    rate = 8 * (cache_bytes - text_bytes) / saved_s
    return BreakEven(
        rate,
        f"{cache_bytes - text_bytes} bytes more than the text against {saved_s * 1e3:.1f} ms of reading saved",
    )
