"""Plots as SVG that takes its ink from the page, so that it reads in light and dark.

Does not know: where figures came from; rows are those of `kvlink eval --json`.
Place on the path: inside a page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from kvlink.plan import break_even

mpl.use("svg")

Rows = Sequence[dict[str, Any]]

_INK, _FAINT = "#010203", "#010204"  # stand-ins, replaced by the page's own colours
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c6bb1", "#7f7f7f")
_MARKS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_SPEEDS = [10 ** (2 + step / 10) for step in range(31)]
_SHIFT_TITLES = {
    "same": "the same question",
    "paraphrase": "in other words",
    "entity": "another fact, same entity",
    "unrelated": "another entity",
}


def quality(rows: Rows) -> str:
    """Share of full F1 against bits per element (log axis), with paired 95 % intervals; text too."""
    points = [
        row
        for row in rows
        if row.get("share_of_full") is not None
        and row["bits_per_element"]
        and row["question_shift"] == "same"
    ]
    if not points:
        return ""
    names = list(dict.fromkeys(_colour_of(row) for row in points))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "quality"}):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots()
        for row in {(row["recipe"], row["selection"]): row for row in points}.values():
            share, full = 100 * row["share_of_full"], row["f1_full"]
            low, high = 100 * (1 + row["ci_low"] / full), 100 * (1 + row["ci_high"] / full)
            colour = _colour(names, _colour_of(row))
            axes.plot([row["bits_per_element"]] * 2, [low, high], lw=0.8, alpha=0.35, color=colour)
            axes.plot(
                row["bits_per_element"], share, _mark_of(row), color=colour, ms=4 if row["scope"] == "head" else 6,
                mfc="none" if row["method"] == "during" else colour,
            )  # fmt: skip
        for name in names:
            axes.plot([], [], "*" if name == "text" else "o", color=_colour(names, name), label=name)
        for codec, mark in _CODEC_MARKS.items():
            axes.plot([], [], mark, color=_INK, label=codec)
        axes.plot([], [], "o", color=_INK, mfc="none", label="hollow: left out during the prefill")
        axes.plot([], [], "o", color=_INK, ms=4, label="small: chosen per head")
        axes.set_xscale("log")
        axes.set_xlabel("bits per element of the full cache, all bytes counted (uncompressed BF16: 16)")
        axes.set_ylabel("% of the full cache's F1")
        figure.legend(fontsize=8, ncols=4, loc="outside lower center")
        return _svg(figure)


def distortion(rows: Rows) -> str:
    """KL to the full cache against bits per element, both on log axes, a line for each codec."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row.get("kl_mean") and row["bits_per_element"] and row["question_shift"] == "same":
            groups.setdefault(_codec_family(row), {})[row["recipe"]] = (
                row["bits_per_element"],
                row["kl_mean"],
            )
    if not groups:
        return ""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "distortion"}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for index, (name, found) in enumerate(groups.items()):
            line = sorted(found.values())
            axes.plot(
                [x for x, _ in line], [y for _, y in line], marker=_MARKS[index % len(_MARKS)], ms=5, lw=1,
                color=_COLOURS[index % len(_COLOURS)], label=name,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bits per element of the full cache, all bytes counted")
        axes.set_ylabel("KL to the full cache, nats a token")
        figure.legend(fontsize=8, ncols=3, loc="outside lower center")
        return _svg(figure)


def _codec_family(row: dict[str, Any]) -> str:
    """Which line of the distortion plot a row belongs to: its selection, and its codec without its size."""
    codec = row["codec"]
    if "rest=" in row["recipe"]:
        kind = "transform, tiers"
    elif codec == "int4/token":
        kind = "INT4 per token"
    else:
        kind = "INT8 … INT1" if codec.startswith("int") else codec
    chosen = "" if row["selection"] in (None, "all") else f"{row['selection']} "
    return chosen + kind


_CODEC_MARKS = {
    "raw, lossless": "o",
    "int8": "s",
    "int4": "^",
    "fewer bits": "v",
    "low rank": "X",
    "transform": "D",
}


def _colour_of(row: dict[str, Any]) -> str:
    if row["mode"] == "text":
        return "text"
    return "all positions" if row["selection"] == "all" else str(row["selection"])


def _colour(names: list[str], name: str) -> str:
    """A colour for each selection; what selects nothing is drawn in the page's ink."""
    selecting = [n for n in names if n not in ("text", "all positions")]
    return _COLOURS[selecting.index(name) % len(_COLOURS)] if name in selecting else _INK


def _mark_of(row: dict[str, Any]) -> str:
    """The mark of a row's codec."""
    codec = row["codec"].partition("/")[0]
    if codec == "text":
        return "*"
    kind = {"raw": "raw, lossless", "lossless": "raw, lossless", "svd": "low rank"}.get(codec, codec)
    return _CODEC_MARKS.get(kind, _CODEC_MARKS["fewer bits"])


def retention(rows: Rows) -> str:
    """Share of full F1 against retention for each selection: a panel for each question shift."""
    chosen = [row for row in rows if row["table"] == "selection" and row["method"] == "after"]
    shifts = [shift for shift in _SHIFT_TITLES if any(row["question_shift"] == shift for row in chosen)]
    if not chosen:
        return ""
    names = list(dict.fromkeys(row["selection"] for row in chosen))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "retention"}):
        figure = Figure(figsize=(9, 3 + 2.4 * (len(shifts) > 2)), layout="constrained")
        grid = figure.subplots(
            math.ceil(len(shifts) / 2), min(2, len(shifts)), sharex=True, sharey=True, squeeze=False
        )
        for axes, shift in zip(grid.flat, shifts, strict=False):
            for index, name in enumerate(names):
                for scope, dash in (("shared", "-"), ("head", ":")):
                    line = sorted(
                        (row["retention"], 100 * (row["share_of_full"] or 0))
                        for row in chosen
                        if (row["selection"], row["scope"], row["question_shift"]) == (name, scope, shift)
                    )
                    axes.plot(
                        [100 * x for x, _ in line], [y for _, y in line], dash, marker=_MARKS[index % len(_MARKS)],
                        ms=4, lw=1.2, color=_COLOURS[index % len(_COLOURS)], label=name if dash == "-" else None,
                    )  # fmt: skip
            axes.set_title(_SHIFT_TITLES[shift], fontsize=10)
            axes.set_xlabel("% of positions kept")
            axes.set_ylabel("% of full F1")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, fontsize=8, ncols=4, loc="outside lower center", title="dotted: per head"
        )
        return _svg(figure)


def rates(rows: Rows) -> str:
    """The link rate above which a cache is usable before the text is read, by the reader's speed."""
    text = next((row for row in rows if row["mode"] == "text" and row.get("wire_bytes")), None)
    wanted = ("raw", "int8", "int4", "q2c+draft@0.5 int4", "q2c+draft@0.25 int4")
    found = {row["recipe"]: row for row in rows if row["recipe"] in wanted and row.get("wire_bytes")}
    # A cache no larger than the text is faster on any link: there is no line to draw.
    larger = [
        found[name]
        for name in wanted
        if text and name in found and found[name]["wire_bytes"] > text["wire_bytes"]
    ]
    if text is None or not larger:
        return ""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "rates"}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for row, colour in zip(larger, _COLOURS, strict=False):
            line = [
                break_even(
                    int(row["wire_bytes"]), int(text["wire_bytes"]), row["context_tokens"] / speed, 0.0
                )
                for speed in _SPEEDS
            ]
            rates_mbps = [(point.rate_bps or math.nan) / 1e6 for point in line]
            axes.plot(_SPEEDS, rates_mbps, label=row["recipe"], color=colour, lw=1.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens per second that the receiver reads")
        axes.set_ylabel("link rate, Mbit/s: above a line\nthe cache arrives before the text is read")
        axes.legend(fontsize=8)
        return _svg(figure)


def spectrum(rows: Rows) -> str:
    """Share of the energy in the top 5 % of singular values, by layer."""
    chosen = [row for row in rows if row["table"] == "spectrum"]
    if not chosen:
        return ""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "spectrum"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        for index, side in enumerate(("keys", "values")):
            line = [(row["layer"], 100 * row["energy_top5"]) for row in chosen if row["side"] == side]
            axes.plot(
                [x for x, _ in line], [y for _, y in line], "o-", label=side, color=_COLOURS[index], ms=5
            )
        axes.set_xticks(sorted({row["layer"] for row in chosen}))
        axes.set_ylim(0, 100)
        axes.set_xlabel("layer")
        axes.set_ylabel("% of the energy in the top\n5 % of singular values")
        axes.legend(fontsize=8)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as inline SVG: no declaration, no metadata, the page's ink."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
