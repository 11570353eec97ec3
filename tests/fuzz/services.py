"""`python -m tests.fuzz.services --messages N --seed S [receiver|sender …]`: random messages for running agents.

Both agents run as processes with the embedded model, over TLS on loopback. For each service, N messages of
every type that it takes: random ones, and honest ones with a few fields changed, from peers with every right
and from one with the least; in any order, cut short, cancelled, doubled. Meanwhile an honest peer asks and
must be answered rightly. Printed: how the calls ended, by method, and one JSON object. What must not be:

- a call that ends as INTERNAL or UNKNOWN, or not within a minute; a peer without a right that is let in
- a traceback or a control character in an agent's log
- an honest call without the right answer
- memory that grows: the median of the last quarter of a long run is beyond the second quarter's by `GROWTH_BYTES`
- an agent that is dead at the end, or that SIGTERM does not end with exit code 0

Each fault is printed, cut, and kept whole in `fuzz-services-SEED/`; the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message_factory import GetMessageClass

from kvlink.v1 import receiver_pb2, sender_pb2
from tests.fuzz import agents
from tests.fuzz.calls import FAULTS, Ended, Plan, Planner, call
from tests.fuzz.honest import Honest
from tests.fuzz.liars import Liar
from tests.fuzz.messages import Seen
from tests.hostile import obeyed

SERVICES = {
    "receiver": receiver_pb2.DESCRIPTOR.services_by_name["ReceiverService"],
    "sender": sender_pb2.DESCRIPTOR.services_by_name["SenderService"],
}
WORKERS = 8
CALLS_A_CONNECTION = 200
GROWTH_BYTES = 64_000_000
LONG_RUN = 100_000
"""Messages from which on the memory is judged: before, threads and caches are still being made."""
_SHOWN = 700
_KEPT = 40


@dataclass(slots=True)
class Tally:
    """What one service was sent, and how the calls ended."""

    service: str
    messages: int = 0
    malformed: int = 0
    by_method: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sent: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_s: float = 0.0

    def table(self) -> str:
        """One line a method: messages, then calls by status."""
        lines = []
        for name, ends in sorted(self.by_method.items()):
            told = ", ".join(f"{status} {count:,}" for status, count in ends.most_common())
            lines.append(f"  {name:18} {self.sent[name]:8,} messages  {told}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        statuses: Counter[str] = Counter()
        for ends in self.by_method.values():
            statuses.update(ends)
        return {
            "messages": self.messages, "malformed": self.malformed, "calls": sum(statuses.values()),
            "statuses": dict(statuses.most_common()), "seconds": round(self.seconds, 1),
            "never_ok": sorted(name for name, ends in self.by_method.items() if not ends["OK"]),
            "slowest_call_s": round(self.slowest_s, 1), "faults": len(self.faults),
        }  # fmt: skip


class Keeper:
    """Prints faults, cut, and keeps them whole in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def keep(self, what: str, plan: Plan | None = None) -> None:
        self._count += 1
        if self._count > _KEPT:
            return
        text = what + (f"\n{_shown(plan)}" if plan else "")
        print(f"FAULT {text[:_SHOWN]}", flush=True)
        self._folder.mkdir(exist_ok=True)
        stem = self._folder / f"{self._count:03}"
        stem.with_suffix(".txt").write_text(text, errors="backslashreplace")
        if plan:
            with stem.with_suffix(".bin").open("wb") as out:
                for message in plan.messages:
                    out.write(len(message).to_bytes(4, "little") + message)


def _shown(plan: Plan) -> str:
    """A call as text: its method, its peer, its messages as prototext."""
    lines = [
        f"call {plan.number}: {plan.method.name} by {plan.peer}, {plan.ending}, metadata {plan.metadata!r}"
    ]
    for message in plan.messages:
        try:
            parsed = GetMessageClass(plan.method.input_type).FromString(message)
            lines.append(text_format.MessageToString(parsed, as_one_line=True)[:20_000])
        except Exception:  # random bytes are kept as they are
            lines.append(f"{len(message)} bytes that are no message: {message[:200]!r}")
    return "\n".join(lines)


async def fuzz(
    network: agents.Network, kind: str, messages: int, seed: int, honest: Honest, seen: Seen, keeper: Keeper
) -> Tally:
    """Send `messages` messages to one service."""
    tally, began = Tally(kind), time.monotonic()
    planner = Planner(SERVICES[kind], seed, honest, seen, network.agents["receiver"].address)
    numbers = iter(range(sys.maxsize))

    async def worker(index: int) -> None:
        peer = agents.LEAST if index == WORKERS - 1 else agents.ALL[index % len(agents.ALL)]
        token = network.token(peer, kind)
        while tally.messages < messages:
            async with network.channel(peer, kind) as channel:
                for _ in range(CALLS_A_CONNECTION):
                    if tally.messages >= messages:
                        return
                    if peer == agents.LEAST:  # the cheapest refusals: they would crowd the others out
                        await asyncio.sleep(0.1)
                    plan = planner.plan(next(numbers), peer, token)
                    ended = await call(channel, plan)
                    _count(tally, plan, ended, keeper)
                    planner.learn(plan, ended)
                    if network.agents[kind].process.poll() is not None:
                        tally.faults.append(f"the {kind} died")
                        keeper.keep(f"the {kind} died in or before this call", plan)
                        tally.messages = messages
                        return

    await asyncio.gather(*(worker(index) for index in range(WORKERS)))
    tally.seconds = time.monotonic() - began
    return tally


def _count(tally: Tally, plan: Plan, ended: Ended, keeper: Keeper) -> None:
    tally.messages += ended.sent
    tally.malformed += ended.sent if plan.malformed else 0
    tally.sent[plan.method.name] += ended.sent
    tally.by_method[plan.method.name][ended.status] += 1
    tally.slowest_s = max(tally.slowest_s, ended.seconds)
    fault = ""
    if ended.status in FAULTS:
        fault = (
            f"{plan.method.name} ended as {ended.status} after {ended.seconds:.1f} s: {ended.details[:500]}"
        )
    elif plan.peer == agents.LEAST and ended.status == "OK" and plan.method.name != "GetCapabilities":
        fault = f"{plan.method.name}: a peer without the right was let in"
    elif obeyed(ended.details):
        fault = f"{plan.method.name}: the message of {ended.status} has {obeyed(ended.details)}: {ended.details[:500]!r}"
    if fault:
        tally.faults.append(fault)
        keeper.keep(fault, plan)


async def run(kinds: list[str], messages: int, seed: int, folder: Path, keep_in: Path) -> dict[str, Any]:
    """Fuzz the services one after the other; the summary, with every fault in words.

    `folder`: for credentials and logs. `keep_in`: where calls that are at fault are kept.
    """
    keeper = Keeper(keep_in)
    found: dict[str, Any] = {"seed": seed, "messages": messages}
    faults: list[str] = []
    network = await asyncio.to_thread(agents.start, folder)
    try:
        seen, honest = Seen(), Honest(network, seed)
        await honest.learn(seen)
        liar = Liar(seed, honest.capabilities, honest.transfers)
        await liar.start(network.liar_at, network.credentials(agents.LIAR))
        for kind in kinds:
            faults += await _one(network, kind, messages, seed, honest, seen, keeper, found)
        await liar.stop()
        found["answered_by_the_liar"] = sum(liar.answered.values())
    finally:
        ends = await asyncio.to_thread(network.stop)
    faults += ends
    for kind, agent in network.agents.items():
        log = agent.said()
        faults += _log_faults(kind, log)
        found[f"{kind}_log_bytes"] = len(log)
    for fault in faults:
        keeper.keep(fault)
    found["faults"] = faults[:20]
    return found


async def _one(
    network: agents.Network, kind: str, messages: int, seed: int, honest: Honest, seen: Seen, keeper: Keeper,
    found: dict[str, Any],
) -> list[str]:  # fmt: skip
    """One service with honest calls beside it; the faults, other than those of single calls, in words."""
    stop, began, agent = asyncio.Event(), time.monotonic(), network.agents[kind]
    agent.resident.clear()
    agent.held.clear()

    async def watch() -> None:
        while not stop.is_set():
            agent.watch(time.monotonic() - began)
            await asyncio.sleep(0.25)

    async def ask_held() -> None:
        while not stop.is_set():
            await asyncio.to_thread(agent.ask_held, time.monotonic() - began)
            await asyncio.sleep(2.0)

    report = honest.start_report()
    beside = [
        asyncio.create_task(watch()),
        asyncio.create_task(ask_held()),
        asyncio.create_task(honest.keep_asking(stop, 0.5)),
    ]
    try:
        tally = await fuzz(network, kind, messages, seed, honest, seen, keeper)
    finally:
        stop.set()
        await asyncio.gather(*beside)
    quarters, held = agents.quarters_bytes(agent.resident), agents.quarters_bytes(agent.held)
    second, last = quarters[1], quarters[3]
    print(f"{kind}: {tally.messages:,} messages in {tally.seconds:.0f} s, seed {seed}\n{tally.table()}")
    for what, medians in ("memory", quarters), ("of it held, as it says", held):
        print(f"  {what}, medians of quarters: {', '.join(f'{bytes_ / 1e6:.0f} MB' for bytes_ in medians)}")
    print(
        f"  honest calls: {report.rounds} rounds, {len(report.wrong)} wrong, {report.busy} told to come again, "
        f"the slowest {report.slowest_s:.1f} s",
        flush=True,
    )
    found[kind] = tally.to_dict() | {
        "rss_quarters_bytes": quarters, "held_quarters_bytes": held, "honest_rounds": report.rounds,
        "honest_wrong": len(report.wrong), "honest_busy": report.busy, "honest_slowest_s": round(report.slowest_s, 1),
    }  # fmt: skip
    faults = [f"an honest call beside the {kind}: {what}" for what in report.wrong[:5]]
    faults += tally.faults[:5]
    if not report.rounds:
        faults.append(f"no honest call was answered beside the {kind}")
    if messages >= LONG_RUN and last - second > GROWTH_BYTES:
        faults.append(f"the {kind}'s memory grew by {(last - second) / 1e6:.0f} MB")
    return faults


def _log_faults(kind: str, log: str) -> list[str]:
    """What must not stand in an agent's log."""
    faults = []
    at = log.find("Traceback")
    if at >= 0:
        count = log.count("Traceback")
        faults.append(
            f"{count} tracebacks in the {kind}'s log, the first: {log[max(0, at - 300) : at + 3000]}"
        )
    for line in log.splitlines():
        if obeyed(line):
            faults.append(f"a line of the {kind}'s log has {obeyed(line)}: {line[:300]!r}")
            break
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.services", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="for each service")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("service", nargs="*", choices=[*SERVICES, []])
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds, keep_in = told.service or list(SERVICES), Path(f"fuzz-services-{told.seed}")
        found = asyncio.run(run(kinds, told.messages, told.seed, Path(folder), keep_in))
    print(json.dumps(found))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
