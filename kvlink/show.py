"""What a person or a program sees: tables, receipts, JSON with the field names of the project.

Does not know: how anything was measured. Place on the path: the face of the command line.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from kvlink.quoting import shown
from kvlink.receipt import BYTE_KINDS, STAGES, Receipt
from kvlink.terminal import Side, say, say_table


def receipt_dict(receipt: Receipt) -> dict[str, Any]:
    """A receipt as data; the names are those of every `--json`."""
    return {
        "transfer_id": receipt.transfer_id,
        "recipe_full": receipt.recipe,
        "context_tokens": receipt.context_tokens,
        "kept_tokens": receipt.kept_tokens,
        "kept_share": receipt.kept_share,
        "segments": receipt.segments,
        "wire_bytes": receipt.wire_bytes,
        "socket_bytes": receipt.socket_bytes,
        "bits_per_element": receipt.bits_per_element,
        **({"warnings": list(receipt.warnings)} if receipt.warnings else {}),
        **({"certificate": asdict(receipt.certificate)} if receipt.certificate else {}),
        "stage_s": {name: receipt.stage_s[name] for name in STAGES if name in receipt.stage_s},
        "bytes": {name: receipt.bytes[name] for name in BYTE_KINDS if name in receipt.bytes},
    }


def say_receipt(receipt: Receipt) -> None:
    """Seconds by stage and bytes by kind, side by side."""
    stages = [(n, f"{receipt.stage_s[n] * 1e3:,.1f}") for n in STAGES if n in receipt.stage_s]
    kinds = [(n, f"{receipt.bytes[n]:,}") for n in BYTE_KINDS if n in receipt.bytes]
    kinds.append(("all", f"{receipt.wire_bytes:,}"))
    if receipt.socket_bytes:
        kinds.append(("socket's own count", f"{receipt.socket_bytes:,}"))
    columns: list[tuple[str, Side]] = [
        ("stage", "left"), ("ms", "right"), ("bytes", "left"), ("count", "right")
    ]  # fmt: skip
    say_table("receipt", columns, ((*a, *b) for a, b in zip_longest(stages, kinds, fillvalue=("", ""))))
    kept = "text" if receipt.is_text else f"{receipt.kept_tokens} of {receipt.context_tokens} tokens"
    if 0 < receipt.kept_share < 1:
        many = f"{receipt.segments} segment{'' if receipt.segments == 1 else 's'}"
        kept += f" in {many}, {receipt.kept_share:.0%} of the positions there"
    say(f"{kept}, {receipt.bits_per_element:.2f} bits per element, recipe {shown(receipt.recipe)}")
    say_certificate(receipt)


def say_certificate(receipt: Receipt) -> None:
    """What the sender found when it checked its message, where it was asked to."""
    found = receipt.certificate
    if found is None:
        return
    finer = f", made finer {found.escalations} times" if found.escalations else ""
    prefill_s = receipt.stage_s.get("prefill", 0.0)
    share = f", {found.seconds / prefill_s:.0%} of the prefill" if prefill_s else ""
    say(
        f"certificate: {found.agreeing_tokens} of {found.tokens} tokens of the sender's own answer, "
        f"KL {found.kl_mean:.1e}, largest logit error {found.logit_error:.2g}{finer}; "
        f"{1e3 * found.seconds:.1f} ms{share}"
    )


def say_demo(report: dict[str, Any]) -> None:
    """The demo's table, examples and verdict."""
    rows = report["rows"]
    say(
        f"{shown(report['model'])}: n = {rows[0]['n']} questions, "
        f"{rows[0]['context_tokens']:.0f} context tokens on average, seed {report['seed']}; two processes on loopback"
    )
    figures: list[tuple[str, Side]] = [
        (name, "right") for name in ("F1", "F1 full", "agreement", "bytes", "bits/element", "TTFT ms")
    ]
    say_table("", [("recipe", "left"), *figures], map(_demo_row, rows), whole=("recipe",))
    for source, found in report["by_source"].items():
        by_recipe = " · ".join(f"{name} {found[name]:.3f}" for name in found if name != "n")
        say(f"F1 on {shown(source)} (n = {found['n']}): {by_recipe}")
    for example in report["examples"]:
        say("")
        say(f"Q {example['question']}")
        say(f"  gold {shown(example['gold'])!r}, the sender itself {shown(example['own_answer'])!r}")
        say("  " + ", ".join(f"{recipe}: {shown(told)!r}" for recipe, told in example["answers"].items()))
    if rows[0]["f1_full"] < 0.2:
        say("")
        say(
            f"The sender itself scores F1 {rows[0]['f1_full']:.3f} here: this model does not know how to read such "
            "text, so F1 says little; agreement says what the transfer kept."
        )
    for failure in report["failures"]:
        say(f"failed {failure}")


def _demo_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["recipe"],
        f"{row['f1']:.3f}",
        f"{row['f1_full']:.3f}",
        f"{row['agreement']:.0%}",
        f"{row['wire_bytes']:,.0f}",
        f"{row['bits_per_element']:.2f}",
        f"{row['ttft_s'] * 1e3:.0f}",
    )


_SHARE = "{:.0%}"
_COLUMNS: dict[str, tuple[str, str]] = {
    "mode": ("mode", "{}"),
    "recipe": ("recipe", "{}"),
    "question_shift": ("question", "{}"),
    "layer": ("layer", "{}"),
    "side": ("side", "{}"),
    "energy_top5": ("energy in the top 5 %", "{:.1%}"),
    "context_tokens": ("context", "{:.0f}"),
    "chunk_bytes": ("chunk", "{:,}"),
    "loss": ("loss", _SHARE),
    "order": ("segments", "{}"),
    "cut": ("came", _SHARE),
    "answered": ("answered", "{:.0%}"),
    "kept_share": ("positions", "{:.1%}"),
    "f1": ("F1", "{:.3f}"),
    "share_of_full": ("of full", "{:.1%}"),
    "interval": ("95 % of F1 − full", "{}"),
    "em": ("EM", "{:.3f}"),
    "agreement": ("agreement", "{:.1%}"),
    "kl_mean": ("KL", "{:.2e}"),
    "energy_keys": ("energy K", "{:.1%}"),
    "energy_values": ("energy V", "{:.1%}"),
    "logit_error": ("logit error", "{:.1e}"),
    "wire_bytes": ("bytes", "{:,.0f}"),
    "bits_per_element": ("bits/element", "{:.2f}"),
    "of_first": ("of the first", "{:.1%}"),
    "total_bytes": ("with TCP/IP", "{:,.0f}"),
    "total_formula": ("formula", "{:,.0f}"),
    "difference": ("difference", "{:+.1%}"),
    "differs": ("differs by more than 2 %", "{}"),
    "overhead_share": ("beside codes", "{:.1%}"),
    "resent_bytes": ("resent", "{:,.0f}"),
    "resent_formula": ("formula", "{:,.0f}"),
    "ack_bytes": ("acknowledgements", "{:,.0f}"),
}
"""Columns of the tables of `kvlink eval`, in their order: field, title, format."""

_SHOWN = {
    "cut": ("recipe", "order", "cut", "answered", "kept_share", "agreement", "f1", "kl_mean", "wire_bytes"),
    "spectrum": ("layer", "side", "energy_top5"),
    "masking": ("mode", "recipe", "f1", "agreement", "kl_mean", "logit_error"),
    "second": (
        "recipe", "mode", "f1", "share_of_full", "agreement", "kl_mean", "wire_bytes", "bits_per_element", "of_first",
    ),
    "transfer": ("recipe", "agreement", "kl_mean", "wire_bytes", "bits_per_element"),
    "overhead": (
        "recipe", "context_tokens", "chunk_bytes", "wire_bytes", "bits_per_element", "total_bytes",
        "total_formula", "difference", "overhead_share", "differs",
    ),
    "overhead, with loss": (
        "loss", "wire_bytes", "resent_bytes", "resent_formula", "ack_bytes", "total_bytes", "difference", "differs",
    ),
}  # fmt: skip
_ANSWERS = (
    "recipe", "question_shift", "f1", "share_of_full", "interval", "em", "agreement", "kl_mean", "energy_keys",
    "energy_values", "wire_bytes", "bits_per_element",
)  # fmt: skip
_PIVOTED = ("selection", "methods")
_PIVOT = ("selection", "scope", "method", "question")
_TEXTS = ("mode", "recipe", "question_shift", "side", "differs", "order")


def say_eval(report: dict[str, Any]) -> None:
    """The tables of an evaluation, one after another, and what the run says of itself."""
    for run in report["runs"]:
        say(
            f"{shown(run['model'])} on {shown(run['data'])}: n = {run['n']}, seed {run['seed']}, "
            f"{run['context_tokens']:.0f} context tokens on average{_full(run)}"
        )
    several = (
        len({(row["model"], row["data"], row.get("variant")) for row in report["rows"] if row["f1"]}) > 1
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        name = "overhead, with loss" if "loss" in row else row["table"]
        variant = " · biased keys" if row.get("variant") == "biased" else ""
        title = f"{name} · {row['model']} · {row['data']}{variant}" if several else name
        groups.setdefault(title, []).append(row)
    for title, rows in groups.items():
        name = title.split(" · ")[0]
        if name not in _PIVOTED:
            _say_flat(title, rows, _SHOWN.get(name, _ANSWERS))
            continue
        _say_pivot(title, rows)
        seen = {row["selection"]: row["sees"] for row in rows}
        say("sees: " + "; ".join(f"{n}: {what}" for n, what in seen.items()))
    for note in report["notes"]:
        say(note)


def _say_flat(title: str, rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """A row of the table for each row; columns that no row has are left out."""
    rows = [{**row, "interval": _interval(row)} for row in rows]
    found = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    if len({row.get("question_shift") for row in rows}) == 1 and "question_shift" in found:
        found.remove("question_shift")
    columns: list[tuple[str, Side]] = [
        (_COLUMNS[name][0], "left" if name in _TEXTS else "right") for name in found
    ]
    cells = ([_cell(name, row.get(name)) for name in found] for row in rows)
    say_table(title, columns, cells, whole=("recipe",))


def _cell(name: str, value: Any) -> str:
    return "" if value is None else _COLUMNS[name][1].format(value)


def _say_pivot(title: str, rows: list[dict[str, Any]]) -> None:
    """F1 by retention, and in brackets its share of full: a line for each method, scope and shift."""
    amounts = list(dict.fromkeys(row["retention"] for row in rows))
    columns: list[tuple[str, Side]] = [(name, "left") for name in _PIVOT]
    columns += [(f"{amount:.0%}", "right") for amount in amounts]
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    for row in rows:
        key = tuple(row[n] for n in ("selection", "scope", "method", "question_shift"))
        share = f" ({row['share_of_full']:.0%})" if row["share_of_full"] is not None else ""
        lines.setdefault(key, {})[row["retention"]] = f"{row['f1']:.3f}{share}"
    found = ([*key, *(cells.get(amount, "") for amount in amounts)] for key, cells in lines.items())
    say_table(f"{title}: F1 (of full)", columns, found, whole=_PIVOT)


def _full(run: dict[str, Any]) -> str:
    return "" if run["f1_full"] is None else f", full F1 {run['f1_full']:.3f}"


def _interval(row: dict[str, Any]) -> str | None:
    if row.get("ci_low") is None:
        return None
    return f"{row['ci_low']:+.3f} … {row['ci_high']:+.3f}"
