"""The story of one transfer as a page: what was chosen, where the time went, what the bytes were.

Does not know: how a transfer is made. Place on the path: the face of `ask --report` and
`demo --report`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvlink.page.frame import fill
from kvlink.plan import break_even
from kvlink.receipt import BYTE_KINDS, STAGES, Receipt
from kvlink.transport.api import Explanation

_STAGES = {
    "prefill": ("sender", "the sender reads the context"),
    "draft": ("sender", "the sender answers briefly itself"),
    "select": ("sender", "evidence and choice of positions"),
    "encode": ("sender", "quantize, code, frame"),
    "verify": ("sender", "the sender decodes its own message and reads its answer from it"),
    "wire": ("link", "on the link"),
    "decode": ("receiver", "check, decode, restore"),
    "read": ("receiver", "the receiver reads the text itself"),
    "first_token": ("receiver", "question read, first token"),
    "generate": ("receiver", "the rest of the answer"),
}
"""Where each stage is, and what happens in it."""

_FULL_SHADE = 0.85


@dataclass(frozen=True, slots=True)
class Story:
    """What a delivery and its answer said. `text`: the context. `reads_tokens_per_s`: the receiver's
    own speed, 0 where it has read nothing yet."""

    question: str
    answer: str
    sender_answer: str
    text: str
    receipt: Receipt
    told: Explanation
    reads_tokens_per_s: float = 0.0


def render(story: Story) -> str:
    """HTML of a story."""
    receipt, told = story.receipt, story.told
    kinds = [(kind, receipt.bytes[kind]) for kind in BYTE_KINDS if receipt.bytes.get(kind)]
    return fill(
        "story.html",
        title="What was handed over",
        story=story,
        receipt=receipt,
        text_bytes=len(story.text.encode()),
        tokens=_tokens(told),
        sent=sum(1 for share in told.kept if share > 0),
        stages=_waterfall(receipt),
        kinds=[(kind, count, 100 * count / max(1, receipt.wire_bytes)) for kind, count in kinds],
        verdict=_verdict(story),
    )


def _tokens(told: Explanation) -> list[dict[str, Any]]:
    """Each token with its shade (square root of its need, so that small needs show too) and fate."""
    most = max(told.need, default=0.0) or 1.0
    return [
        {
            "text": text,
            "shade": f"{_FULL_SHADE * (max(0.0, need) / most) ** 0.5:.3f}",
            "fate": "sent" if kept >= 1 else "dropped" if kept <= 0 else "partly",
            "note": f"need {100 * need:.2f} %, kept by {100 * kept:.0f} % of layers and heads",
        }
        for text, need, kept in zip(told.tokens, told.need, told.kept, strict=True)
    ]


def _waterfall(receipt: Receipt) -> list[dict[str, Any]]:
    """Stages one after another, as they were, in per cent of the whole."""
    stages = [(name, receipt.stage_s[name]) for name in STAGES if name in receipt.stage_s]
    total = max(1e-9, sum(seconds for _, seconds in stages))
    out, at = [], 0.0
    for name, seconds in stages:
        where, meaning = _STAGES[name]
        left, width = min(99.0, 100 * at / total), max(0.3, 100 * seconds / total)
        out.append(
            {
                "name": name.replace("_", " "), "where": where, "means": meaning, "ms": 1e3 * seconds,
                "left": left, "width": min(width, 100 - left),
            }
        )  # fmt: skip
        at += seconds
    return out


def _verdict(story: Story) -> str:
    """Whether the text would have been the better choice, and on which links."""
    receipt = story.receipt
    if receipt.is_text:
        return "The text itself was sent: the receiver read it."
    read_s = receipt.stage_s.get("prefill", 0.0)
    if story.reads_tokens_per_s:
        read_s = receipt.context_tokens / story.reads_tokens_per_s
    found = break_even(
        receipt.wire_bytes, len(story.text.encode()), read_s, receipt.stage_s.get("decode", 0.0)
    )
    if found.rate_bps is None:
        return f"The text would have been the better choice on any link: {found.reason}."
    return f"The cache is usable before the text is read above {found.rate_bps / 1e6:,.1f} Mbit/s: {found.reason}."
