"""`python -m tests.faults`: everything that can go wrong on purpose, in a quarter of an hour.

    specification  the tests of sessions, resume, security, bombs and fuzz targets
    fuzz           every parser under a coverage-guided fuzzer
    mutations      damaged and forged transfers
    cuts           transfers cut at every frame, on real connections, by the death of either process
    fairness       an honest peer beside a greedy one
    peers          how long until a dead or silent peer is noticed
    goodput        a lossy line beside raw TCP
    load           many agents against one receiver

Each step prints its figures as one JSON object. The last line is the summary; the exit code is 1 where
anything was lost, mixed up, wrong, sent twice, or slower than 0.9 of raw TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kvlink.agent.sender import Sender
from kvlink.eval import line
from kvlink.eval.load import run_load
from kvlink.model.loading import EMBEDDED, load
from tests.faults import cuts, fairness, goodput, mutations, peers

SPECIFICATION = (
    "tests/wire", "tests/transport", "tests/fuzz", "tests/agent/test_security.py", "tests/agent/test_resume.py",
    "tests/agent/test_admission.py", "tests/agent/test_store.py", "tests/agent/test_bombs.py",
)  # fmt: skip
GOODPUT = 0.9
GROWTH = 0.05


def specification() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-rs", "--no-header", *SPECIFICATION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "said": told[-1] if done.returncode == 0 else told[-15:]}


def fuzz(seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout:
        return {"skipped": done.stderr.strip()[-300:]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "inputs": sum(found["inputs"].values()),
        "targets": len(found["inputs"]),
        "broken": found["broken"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--mutations", type=int, default=12_000)
    parser.add_argument("--connections", type=int, default=40, help="cuts of real connections")
    parser.add_argument("--deaths", type=int, default=4, help="kills of each agent's process")
    parser.add_argument("--minutes", type=float, default=4.0, help="of load")
    parser.add_argument("--agents", type=int, default=12)
    parser.add_argument("--fuzz-seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}

    def step(name: str, work: Callable[[], dict[str, Any]]) -> None:
        began = time.monotonic()
        found[name] = work()
        print(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(found[name])}", flush=True)

    sender = Sender(load(), chunk_bytes=4096)
    step("specification", specification)
    step("fuzz", lambda: fuzz(told.fuzz_seconds))
    step("mutations", lambda: _mutations(sender, told.mutations, told.seed))
    step("cuts", lambda: _cuts(sender, told.connections, told.deaths))
    step("peers", lambda: asyncio.run(peers.seconds_to_notice(sender, EMBEDDED)))
    step("fairness", _fairness)
    step("goodput", _goodput)
    step("load", lambda: asyncio.run(run_load(told.minutes, told.agents, EMBEDDED, told.seed)).to_dict())
    summary, faults = _sum_up(found)
    for fault in faults:
        print(f"FAULT {fault}")
    print(json.dumps(summary))
    sys.exit(bool(faults))


def _mutations(sender: Sender, count: int, seed: int) -> dict[str, Any]:
    report = mutations.run(sender, count, seed)
    return {
        "tried": report.tried, "refused": report.refused, "identical": report.identical, "forged": report.forged,
        "wrong": report.wrong, "other": report.other, "by_error": report.by_error,
        "peak_growth_bytes": report.grown_bytes,
    }  # fmt: skip


def _cuts(sender: Sender, connections: int, deaths: int) -> dict[str, Any]:
    report = asyncio.run(cuts.run(sender, EMBEDDED, connections, deaths))
    return {
        "cut_points": report.cut_points, "resent_bytes": report.resent_bytes,
        "in_flight_bytes": report.in_flight_bytes, "answers_lost": report.answers_lost,
        "answers_wrong": report.answers_wrong, "notes": report.notes,
    }  # fmt: skip


def _fairness() -> dict[str, Any]:
    rows = asyncio.run(fairness.measure())
    print(fairness.table(rows))
    return {
        row.kind: {"ratio": round(row.ratio, 2), "refused": row.refused, "fair": row.fair} for row in rows
    }


def _goodput() -> dict[str, Any]:
    why = line.why_not()
    return {"skipped": why} if why else {"rows": goodput.measure()}


def _sum_up(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The summary, and what is not as it should be."""
    changed, cut, loaded = found["mutations"], found["cuts"], found["load"]
    summary = {
        "cut_points": cut["cut_points"],
        "mutations": changed["tried"],
        "resent_bytes": cut["resent_bytes"],
        "answers_lost": cut["answers_lost"] + loaded["answers_lost"],
        "answers_mixed": loaded["answers_mixed"],
        "wrong_after_corruption": len(changed["wrong"]) + cut["answers_wrong"],
        "dead_peer_s": round(max(found["peers"].values()), 2),
        "rss_before_bytes": loaded["rss_before_bytes"],
        "rss_after_bytes": loaded["rss_after_bytes"],
    }
    faults = [
        f"{name}: {summary[name]}"
        for name in ("resent_bytes", "answers_lost", "answers_mixed", "wrong_after_corruption")
        if summary[name]
    ]
    faults += ["the specification fails"] if not found["specification"]["passed"] else []
    faults += [f"fuzz: {name}" for name in found["fuzz"].get("broken", ())]
    faults += [f"another exception: {what}" for what in changed["other"][:5]]
    faults += [f"an answer of no context, {loaded['answers_other']} times"] if loaded["answers_other"] else []
    faults += [f"memory grew by {loaded['rss_growth']:.1%}"] if loaded["rss_growth"] > GROWTH else []
    faults += [f"unfair: {kind}, {row}" for kind, row in found["fairness"].items() if not row["fair"]]
    for row in found["goodput"].get("rows", ()):
        if row["ratio"] < GOODPUT:
            faults.append(f"goodput at {row['loss']:.0%} loss: {row['ratio']:.2f} of raw TCP")
    return summary, faults


if __name__ == "__main__":
    main()
