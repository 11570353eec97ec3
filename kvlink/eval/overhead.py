"""Protocol overhead: what a transfer costs beside its codes, by formula and as the kernel counts it.

The formulas stand in `docs/overhead.md`, written from the specification and not from the code that
makes the frames; here they are held against frames, and against the counters of the socket that
carried them. A namespace of its own gives a line with loss.

Does not know: answers. Place on the path: all of it, over real gRPC, for counting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvlink.agent.context import Context
from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.transfer import Transfer
from kvlink.codecs.base import SIDES
from kvlink.errors import ContextError
from kvlink.eval import line
from kvlink.eval.items import Item
from kvlink.eval.rows import Row
from kvlink.model.loading import LanguageModel, load
from kvlink.payload import CacheShape
from kvlink.recipe import Recipe
from kvlink.transport.client import ReceiverClient
from kvlink.transport.link import added_by_grpc, grpc_bytes
from kvlink.transport.server import Server
from kvlink.transport.sockets import SocketCount
from kvlink.wire.messages import recipe_to_proto

RETENTIONS = (1.0, 0.5, 0.25)
CONTEXT_TOKENS = (128, 512, 1024)
CHUNK_BYTES = (16 * 1024, 128 * 1024, 512 * 1024)
LOSSES = (0.0, 0.01, 0.02, 0.03, 0.05)
LOSS_REPEATS = 5
CONGESTION = "cubic"
TOLERANCE = 0.02

TCP_IP_BYTES = 52
"""Headers of a segment: 20 of IPv4, 20 of TCP, 12 for its timestamps. Link layers come on top."""

PARTS = ("codes", "scales", "map", "manifest", "header", "framing", "grpc", "http2", "tcp_ip")


@dataclass(frozen=True, slots=True)
class Constants:
    """What the formulas take from one measurement: the manifest's own bytes without its numbers, what
    HTTP/2 says once on a connection (preface, settings, headers of the call), and the segments that
    a connection takes beyond full ones (handshake, small writes)."""

    manifest_bytes: int
    http2_bytes: int
    segments: int


def varint(value: int) -> int:
    """Bytes of an integer in protobuf: 7 bits in each."""
    return max(1, -(-value.bit_length() // 7))


def number(value: int) -> int:
    """Bytes of an integer field with a tag of one byte; proto3 leaves zeros out."""
    return 1 + varint(value) if value else 0


def nested(size: int) -> int:
    """Bytes of a message or of bytes within another message."""
    return 1 + varint(size) + size


def predict(
    shape: CacheShape, recipe: Recipe, kept: int, map_sets: int, chunk_bytes: int, known: Constants
) -> dict[str, int]:
    """Bytes by part of a transfer without a coder: each a formula of `docs/overhead.md`."""
    out = dict.fromkeys(PARTS, 0)
    groups: list[list[int]] = [[map_sets * -(-shape.tokens // 8)]] if map_sets else []
    out["map"] = sum(map(sum, groups))
    tensor = (shape.kv_heads, kept, shape.head_size)
    for layer in range(shape.layers):
        parts = [
            part
            for side in SIDES
            for part in recipe.codec.part_sizes(layer, side, tensor, shape.element_bytes, 2)
        ]
        for kind, size in parts:
            out[kind] += size
        groups.append([size for _, size in parts])
    codec = recipe_to_proto(recipe).codec.ByteSize()
    out["header"] = number(1) + nested(nested(number(kept) + number(map_sets)) + nested(codec))
    out["manifest"] = known.manifest_bytes + varint(shape.tokens)
    frames = [out["manifest"], out["header"]]
    for index, sizes in enumerate(groups):
        frames += _group_frames(len(frames), sizes, chunk_bytes, is_map=bool(map_sets) and index == 0)
    frames.append(number(len(frames)) + nested(nested(32)))
    frames.append(number(len(frames)) + nested(nested(32) + number(1)))
    out["framing"] = sum(frames[2:]) - sum(map(sum, groups))
    out["grpc"] = grpc_bytes(frames)
    out["http2"] = known.http2_bytes
    return out


def _group_frames(sequence: int, sizes: Sequence[int], chunk_bytes: int, *, is_map: bool) -> list[int]:
    """Bytes of the frames of one group from `sequence` on: what it brings, its first bytes, then chunks."""
    left = sum(sizes)
    first = min(left, chunk_bytes)
    told = sum(nested(number(1) + number(size)) for size in sizes) + (0 if is_map else nested(2))
    frames = [number(sequence) + nested(told + 5 + nested(first))]
    for offset in range(first, left, chunk_bytes):
        size = min(chunk_bytes, left - offset)
        frames.append(number(sequence + len(frames)) + nested(number(offset) + 5 + nested(size)))
    return frames


def packets(stream_bytes: int, segment_bytes: int) -> int:
    """Segments that carry a stream; each costs `TCP_IP_BYTES`."""
    return math.ceil(stream_bytes / segment_bytes)


def resent(data_bytes: float, loss: float) -> float:
    """Expected bytes sent again where each packet is lost with probability `loss`, again and again."""
    return data_bytes * loss / (1 - loss)


@dataclass(frozen=True, slots=True)
class Pushed:
    """One transfer over a connection of its own, and what the kernel counted on it from the dial on."""

    transfer: Transfer
    count: SocketCount


async def push(receiver: ReceiverClient, transfer: Transfer) -> Pushed | None:
    """Push a transfer; None where the kernel's counters cannot be read here."""
    async for _ in receiver.push(transfer.frames):
        pass
    await asyncio.sleep(0.02)  # the last acknowledgement is on its way
    count = receiver.socket_count()
    return Pushed(transfer, count) if count else None


async def _push_all(
    lm: LanguageModel, transfers: Sequence[Transfer], on_step: Callable[[], None]
) -> list[Pushed]:
    """Each transfer over a fresh connection to a receiver in this process."""
    server = Server("127.0.0.1:0", receiver=ReceiverService(Receiver(lm, added_bytes=added_by_grpc)))
    port = await server.start()
    found = []
    try:
        for transfer in transfers:
            async with ReceiverClient(f"127.0.0.1:{port}") as receiver:
                done = await push(receiver, transfer)
            if done is not None:
                found.append(done)
            on_step()
    finally:
        await server.stop(0)
    return found


def cut_context(sender: Sender, text: str, tokens: int) -> Context:
    """A context of `tokens` tokens or a few less: the text's beginning, word by word."""
    words = text.split(" ")[:tokens]  # a word has at least one token
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if _fits(sender.lm, " ".join(words[:middle]), tokens) else (low, middle - 1)
        )
    return sender.read(" ".join(words[:low]))


def _fits(lm: LanguageModel, text: str, tokens: int) -> bool:
    try:
        return len(lm.context_ids(text)) <= tokens
    except ContextError:  # more than the window
        return False


def _constants(lm: LanguageModel, sender: Sender, context: Context, recipe: Recipe) -> Constants:
    """The figures that the formulas do not derive, from one small transfer."""
    small = sender.pack(context, "", recipe)
    found = asyncio.run(_push_all(lm, [small], lambda: None))
    manifest = len(small.frames[0]) - varint(context.cache.tokens)
    if not found:
        return Constants(manifest, 0, 0)
    count = found[0].count
    beyond = count.data_segments_out - packets(count.bytes_acked, count.segment_bytes)
    return Constants(manifest, count.bytes_acked - small.receipt.wire_bytes, beyond)


def steps() -> int:
    """Transfers that `measure` makes, for a progress bar."""
    return len(RETENTIONS) * len(CONTEXT_TOKENS) * (len(CHUNK_BYTES) + 1) + len(LOSSES)


def measure(
    lm: LanguageModel, items: Sequence[Item], known: dict[str, Any], on_step: Callable[[], None]
) -> tuple[list[Row], list[str]]:
    """The rows of the table, and notes: what could not be measured here, and why.

    `known`: the fields that every row of the run has.
    """
    text = " ".join(item.context for item in items)
    notes: list[str] = []
    sender = Sender(lm, added_bytes=added_by_grpc)
    lengths = [min(tokens, lm.window - 64) for tokens in CONTEXT_TOKENS]
    rows = []
    plans: list[tuple[Context, Recipe, int]] = []
    for tokens in dict.fromkeys(lengths):
        context = cut_context(sender, text, tokens)
        for retention in RETENTIONS:
            recipe = Recipe.parse("int4" if retention == 1.0 else f"q2c@{retention} int4")
            plans += [(context, replace(recipe, coder="identity"), chunk) for chunk in CHUNK_BYTES]
            plans.append((context, recipe, CHUNK_BYTES[-1]))
    constants = _constants(lm, sender, plans[0][0], Recipe.parse("int4 coder=identity"))
    question = items[0].question
    transfers = []
    for context, recipe, chunk in plans:
        transfers.append(
            Sender(lm, chunk_bytes=chunk, added_bytes=added_by_grpc).pack(context, question, recipe)
        )
    found = asyncio.run(_push_all(lm, transfers, on_step))
    if not found:
        notes.append("the kernel's counters cannot be read here: the overhead was not measured")
    for (context, recipe, chunk), pushed in zip(plans, found, strict=False):
        names = _manifest_names(recipe, plans[0][1], constants)
        rows.append(_row(context, recipe, chunk, pushed, names, known))
    lossy, why = _on_lossy_lines(lm, text, question, on_step)
    notes += [why] if why else []
    return rows + [replace(row, **known) for row in lossy], notes


def _manifest_names(recipe: Recipe, first: Recipe, known: Constants) -> Constants:
    """The manifest's constant with this recipe's own words and numbers in it."""
    more = nested(recipe_to_proto(recipe).ByteSize()) - nested(recipe_to_proto(first).ByteSize())
    return replace(known, manifest_bytes=known.manifest_bytes + more)


def _row(
    context: Context, recipe: Recipe, chunk: int, pushed: Pushed, known: Constants, told: dict[str, Any]
) -> Row:
    """Formula beside measurement, part by part, of one transfer."""
    transfer, count = pushed.transfer, pushed.count
    shape, receipt = context.cache.shape, transfer.receipt
    sets = 1 if receipt.kept_tokens < shape.tokens else 0
    formula = predict(shape, recipe, receipt.kept_tokens, sets, chunk, known)
    header = len(transfer.frames[1])
    found = {name: receipt.bytes.get(name, 0) for name in PARTS}
    found["header"] = header
    found["framing"] -= header
    found["http2"] = count.bytes_acked - receipt.wire_bytes
    stream = sum(formula.values())
    formula["tcp_ip"] = TCP_IP_BYTES * (known.segments + packets(stream, count.segment_bytes))
    found["tcp_ip"] = TCP_IP_BYTES * count.data_segments_out
    total, predicted = sum(found.values()), sum(formula.values())
    differing = [
        name
        for name in PARTS
        if abs(found[name] - formula[name]) > TOLERANCE * max(found[name], formula[name])
    ]
    return Row(
        table="overhead", mode="kv", recipe=_short(recipe), recipe_full=str(recipe),
        selection=recipe.selection.name, scope=recipe.selection.scope,
        retention=recipe.selection.amount.value, method=recipe.selection.when, n=1,
        wire_bytes=receipt.wire_bytes, bits_per_element=receipt.bits_per_element,
        context_tokens=shape.tokens, kept_tokens=receipt.kept_tokens,
        more={
            "chunk_bytes": chunk, "coder": recipe.coder,
            **{f"{name}_bytes": found[name] for name in PARTS},
            **{f"{name}_formula": formula[name] for name in PARTS},
            "total_bytes": total, "total_formula": predicted, "difference": total / predicted - 1,
            "differs": " ".join(differing),
            "overhead_share": 1 - found["codes"] / total,
            "ack_bytes": TCP_IP_BYTES * count.segments_in + count.bytes_received,
            "segments_out": count.segments_out, "segments_in": count.segments_in,
        },
        **told,
    )  # fmt: skip


def _short(recipe: Recipe) -> str:
    words = [] if recipe.selection.method == "all" else [str(recipe.selection)]
    return " ".join([*words, recipe.codec.family, f"coder={recipe.coder}"])


def _on_lossy_lines(
    lm: LanguageModel, text: str, question: str, on_step: Callable[[], None]
) -> tuple[list[Row], str]:
    """Retransmission at each loss rate; or why this machine cannot measure it."""
    why = line.why_not()
    if why:
        return [], f"retransmission was not measured: {why}"
    rows = []
    for loss in LOSSES:
        task = {
            "model": lm.name, "dtype": lm.dtype, "text": text, "question": question,
            "link": asdict(line.Link(loss=loss)),
        }  # fmt: skip
        found = line.run_in_namespace("kvlink.eval.overhead", task)
        rows.append(_lossy_row(loss, found))
        on_step()
    return rows, ""


def _lossy_row(loss: float, found: dict[str, Any]) -> Row:
    data, again = found["bytes_sent"] - found["bytes_retransmitted"], found["bytes_retransmitted"]
    formula = resent(data, loss)
    return Row(
        table="overhead", mode="kv", recipe=found["recipe"], recipe_full=found["recipe"], selection="all",
        scope="shared", retention=1.0, method="after", n=found["n"], wire_bytes=found["wire_bytes"],
        context_tokens=found["context_tokens"], kept_tokens=found["context_tokens"],
        more={
            "loss": loss, "congestion": found["congestion"], "rtt_s": found["rtt_s"],
            "rate_bps": found["rate_bps"], "segment_bytes": found["segment_bytes"],
            "resent_bytes": again, "resent_formula": formula, "resent_share": again / data,
            "total_bytes": data + again, "total_formula": data + formula,
            "difference": (data + again) / (data + formula) - 1,
            "differs": "resent" if abs(again - formula) > TOLERANCE * (data + formula) else "",
            "segments_out": found["segments_out"], "data_segments_out": found["data_segments_out"],
            "segments_formula": packets(data / found["n"], found["segment_bytes"]) * found["n"],
            "ack_bytes": TCP_IP_BYTES * found["segments_in"],
            "ack_formula": TCP_IP_BYTES * packets(data, 2 * found["segment_bytes"]),
            "dropped_packets": found["dropped"],
        },
    )  # fmt: skip


async def _push_over(task: dict[str, Any]) -> dict[str, Any]:
    """Inside the namespace: the same transfer a few times, counters summed up."""
    lm = load(task["model"], dtype=task["dtype"])
    sender = Sender(lm, added_bytes=added_by_grpc)
    context = cut_context(sender, task["text"], min(CONTEXT_TOKENS[-1], lm.window - 64))
    link = line.Link(**task["link"])
    pinned = _pin_congestion()
    found: list[SocketCount] = []
    with line.Line(link) as held:
        server = Server(
            f"{line.HERE}:0", receiver=ReceiverService(Receiver(lm, added_bytes=added_by_grpc)), insecure=True
        )
        port = held.port = await server.start()
        for _ in range(LOSS_REPEATS):
            transfer = sender.pack(context, task["question"], "raw")  # each is taken once
            async with ReceiverClient(f"{line.THERE}:{port}", insecure=True) as receiver:
                done = await push(receiver, transfer)
            if done is not None:
                found.append(done.count)
        await server.stop(0)
        dropped = held.dropped
    sums = {
        name: sum(getattr(count, name) for count in found)
        for name in ("bytes_sent", "bytes_retransmitted", "segments_out", "segments_in", "data_segments_out")
    }
    return {
        **sums, "n": len(found), "recipe": "raw", "wire_bytes": transfer.receipt.wire_bytes,
        "context_tokens": context.cache.tokens, "segment_bytes": found[0].segment_bytes,
        "dropped": dropped, "congestion": pinned, "rtt_s": link.rtt_s, "rate_bps": link.rate_bps,
    }  # fmt: skip


def _pin_congestion() -> str:
    """Set this namespace's congestion control; returns the one in force."""
    file = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    with contextlib.suppress(OSError):  # the machine may not let us: the rows say which one it was
        file.write_text(CONGESTION)
    return file.read_text().strip()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_push_over(json.loads(sys.stdin.read())))))
