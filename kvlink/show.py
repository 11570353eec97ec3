"""What a person or a program sees: tables, receipts, JSON with the field names of the project.

Does not know: how anything was measured. Place on the path: the face of the command line.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from kvlink.receipt import BYTE_KINDS, STAGES, Receipt


def receipt_dict(receipt: Receipt) -> dict[str, Any]:
    """A receipt as data; the names are those of every `--json`."""
    return {
        "transfer_id": receipt.transfer_id,
        "recipe_full": receipt.recipe,
        "context_tokens": receipt.context_tokens,
        "kept_tokens": receipt.kept_tokens,
        "wire_bytes": receipt.wire_bytes,
        "socket_bytes": receipt.socket_bytes,
        "bits_per_element": receipt.bits_per_element,
        "stage_s": {name: receipt.stage_s[name] for name in STAGES if name in receipt.stage_s},
        "bytes": {name: receipt.bytes[name] for name in BYTE_KINDS if name in receipt.bytes},
    }


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_receipt(console: Console, receipt: Receipt) -> None:
    """Seconds by stage and bytes by kind, side by side."""
    table = Table(title="receipt", title_justify="left", show_edge=False, pad_edge=False)
    for name, justify in (("stage", "left"), ("ms", "right"), ("bytes", "left"), ("count", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    stages = [(n, f"{receipt.stage_s[n] * 1e3:,.1f}") for n in STAGES if n in receipt.stage_s]
    kinds = [(n, f"{receipt.bytes[n]:,}") for n in BYTE_KINDS if n in receipt.bytes]
    kinds.append(("all", f"{receipt.wire_bytes:,}"))
    if receipt.socket_bytes:
        kinds.append(("socket's own count", f"{receipt.socket_bytes:,}"))
    for index in range(max(len(stages), len(kinds))):
        left = stages[index] if index < len(stages) else ("", "")
        right = kinds[index] if index < len(kinds) else ("", "")
        table.add_row(*left, *right)
    console.print(table)
    kept = f"{receipt.kept_tokens} of {receipt.context_tokens} tokens" if receipt.kept_tokens else "text"
    console.print(
        f"{kept}, {receipt.bits_per_element:.2f} bits per element, recipe {receipt.recipe}", highlight=False
    )


def print_demo(console: Console, report: dict[str, Any]) -> None:
    """The demo's table, examples and verdict."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for name in ("F1", "F1 full", "agreement", "bytes", "bits/element", "TTFT ms"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["recipe"],
            f"{row['f1']:.3f}",
            f"{row['f1_full']:.3f}",
            f"{row['agreement']:.0%}",
            f"{row['wire_bytes']:,.0f}",
            f"{row['bits_per_element']:.2f}",
            f"{row['ttft_s'] * 1e3:.0f}",
        )
    rows = report["rows"]
    console.print(
        f"{report['model']}: n = {rows[0]['n']} questions, {rows[0]['context_tokens']:.0f} context tokens on average, "
        f"seed {report['seed']}; two processes on loopback",
        highlight=False,
    )
    console.print(table)
    for source, figures in report["by_source"].items():
        shown = " · ".join(f"{name} {figures[name]:.3f}" for name in figures if name != "n")
        console.print(f"F1 on {source} (n = {figures['n']}): {shown}", highlight=False)
    for example in report["examples"]:
        console.print(f"\nQ {example['question']}", markup=False, highlight=False)
        console.print(
            f"  gold {example['gold']!r}, the sender itself {example['own_answer']!r}",
            markup=False,
            highlight=False,
        )
        told = ", ".join(f"{recipe}: {answer!r}" for recipe, answer in example["answers"].items())
        console.print(f"  {told}", markup=False, highlight=False)
    if rows[0]["f1_full"] < 0.2:
        console.print(
            f"\nThe sender itself scores F1 {rows[0]['f1_full']:.3f} here: this model does not know how to read such "
            "text, so F1 says little; agreement says what the transfer kept.",
            highlight=False,
        )
    for failure in report["failures"]:
        console.print(f"[bold red]failed[/] {failure}", highlight=False)
