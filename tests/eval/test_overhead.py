"""The formulas of the overhead, written from the specification, against real frames and real sockets."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.eval import line, overhead
from kvlink.eval.questions import generated
from kvlink.recipe import Recipe
from kvlink.transport.client import ReceiverClient
from kvlink.transport.link import added_by_grpc
from kvlink.transport.server import Server
from kvlink.v1 import wire_pb2
from tests.limits import HANGS_S

TEXT = next(generated(1)).context
QUESTION = "Who leads it?"


@given(st.integers(0, 2**63))
def test_the_size_of_a_number_is_protobufs(value):
    assert overhead.number(value) == wire_pb2.Frame(sequence=value).ByteSize()


@pytest.mark.parametrize("chunk_bytes", [1000, 16_384, 524_288])
@pytest.mark.parametrize(
    "recipe",
    ["int4", "int8", "raw", "q2c@0.5 int4", "q2c@0.1 int3", "q2c@0.25 int4 scope=head", "svd=8 int8"],
)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_without_a_coder_the_formula_is_exact(random_lm, architecture, recipe, chunk_bytes):
    lm = random_lm(architecture, "bfloat16")
    sender = Sender(lm, chunk_bytes=chunk_bytes, added_bytes=added_by_grpc)
    context = sender.read(TEXT)
    parsed = Recipe.parse(f"{recipe} coder=identity")
    transfer = sender.pack(context, QUESTION, parsed)
    shape, kept = context.cache.shape, transfer.receipt.kept_tokens
    sets = 0 if kept == shape.tokens else 8 if parsed.selection.scope == "head" else 1
    small = sender.pack(sender.read("One word."), QUESTION, parsed)
    manifest = len(small.frames[0]) - overhead.varint(small.receipt.context_tokens)
    known = overhead.Constants(manifest, 0, 0)
    formula = overhead.predict(shape, parsed, kept, sets, chunk_bytes, known)
    found = transfer.receipt.bytes
    assert formula["header"] == len(transfer.frames[1])
    assert formula["framing"] + formula["header"] == found["framing"]
    for name in ("codes", "scales", "map", "manifest", "grpc"):
        assert formula[name] == found.get(name, 0), name
    assert sum(formula.values()) == transfer.receipt.wire_bytes


def test_with_a_coder_the_formula_is_an_upper_bound(random_lm):
    sender = Sender(random_lm("qwen2", "bfloat16"), added_bytes=added_by_grpc)
    context = sender.read(TEXT)
    transfer = sender.pack(context, QUESTION, "q2c@0.5 int4")
    shape, kept = context.cache.shape, transfer.receipt.kept_tokens
    known = overhead.Constants(len(transfer.frames[0]), 0, 0)
    formula = overhead.predict(shape, transfer.manifest.recipe, kept, 1, 524_288, known)
    for name in ("codes", "scales", "map"):
        assert transfer.receipt.bytes[name] <= formula[name]


def test_what_is_sent_again():
    assert overhead.resent(1000, 0.0) == 0
    assert overhead.resent(1000, 0.5) == pytest.approx(1000), "half of what is sent again is lost too"
    assert overhead.packets(1449, 1448) == 2


def test_a_context_is_cut_to_a_length(tiny):
    sender = Sender(tiny, added_bytes=added_by_grpc)
    context = overhead.cut_context(sender, TEXT, 64)
    assert 56 <= context.cache.tokens <= 64
    assert TEXT.startswith(context.text)


def test_the_table_holds_formulas_against_the_socket(tiny, monkeypatch):
    monkeypatch.setattr(overhead, "CONTEXT_TOKENS", (64, 256))
    monkeypatch.setattr(overhead, "LOSSES", ())
    steps: list[int] = []
    items = [next(generated(seed)) for seed in range(4)]
    rows, notes = overhead.measure(
        tiny, items, {"model": "m", "data": "d", "seed": 1}, lambda: steps.append(1)
    )
    if any("counters cannot be read" in note for note in notes):
        pytest.skip(notes[0])
    assert len(rows) == 2 * 3 * 4 == len(steps)
    for row in rows:
        told = row.to_dict()
        parts = sum(told[f"{name}_bytes"] for name in overhead.PARTS if name != "tcp_ip")
        assert told["total_bytes"] == parts + told["tcp_ip_bytes"]
        if told["coder"] == "identity":
            for name in ("codes", "scales", "map", "manifest", "header", "framing", "grpc"):
                assert told[f"{name}_bytes"] == told[f"{name}_formula"], name
            assert abs(told["total_bytes"] - told["total_formula"]) < 1000, "HTTP/2 and TCP talk a little"
        assert told["wire_bytes"] == parts - told["http2_bytes"]
        assert 0 < told["overhead_share"] < 0.5


needs_a_line = pytest.mark.skipif(bool(line.why_not()), reason=f"no line of its own: {line.why_not()}")


@needs_a_line
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_over_a_line_with_loss_the_kernel_counts_what_is_sent_again(loss):
    task = {
        "model": "kvlink-tiny", "dtype": "bfloat16", "text": TEXT * 4, "question": QUESTION,
        "link": {"rate_bps": 200e6, "rtt_s": 0.004, "loss": loss, "seed": 1},
    }  # fmt: skip
    found = line.run_in_namespace("kvlink.eval.overhead", task)
    assert found["n"] == overhead.LOSS_REPEATS
    assert found["segment_bytes"] == line.MTU - overhead.TCP_IP_BYTES
    sent = found["bytes_sent"] - found["bytes_retransmitted"]
    # gRPC may cut its stream into larger frames than the 16,384 bytes that the receipt counts with.
    assert 0.999 * found["wire_bytes"] < sent / found["n"] < found["wire_bytes"] + 2000
    if loss:
        expected = overhead.resent(sent, loss)
        assert 0.5 * expected < found["bytes_retransmitted"] < 2 * expected
        assert found["dropped"] > 0
    else:
        assert found["dropped"] == 0
        # On a machine that is busy a timer may fire before the answer that is on its way.
        assert found["bytes_retransmitted"] < 0.02 * sent


LINE_TEST = """
import json, socket, sys, threading, time
from kvlink.eval.line import HERE, THERE, Line, Link
task = json.loads(sys.stdin.read())
with Line(Link(**task)) as line, socket.create_server((HERE, 0)) as server:
    line.port = server.getsockname()[1]
    got = []
    def serve():
        peer, address = server.accept()
        while data := peer.recv(1 << 16):
            got.append(data)
        peer.sendall(b"done " + address[0].encode())
        peer.close()
    thread = threading.Thread(target=serve)
    thread.start()
    data = bytes(range(256)) * 2000
    began = time.monotonic()
    with socket.create_connection((THERE, line.port)) as client:
        dialled = time.monotonic() - began
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        reply = client.recv(100).decode()
    thread.join()
    took = time.monotonic() - began
    print(json.dumps({"equal": b"".join(got) == data, "reply": reply, "dialled": dialled, "took": took}))
"""


@needs_a_line
@pytest.mark.parametrize("loss", [0.0, 0.03])
def test_a_line_carries_every_byte_at_its_rate_and_delay(tmp_path, loss):
    import subprocess
    import sys

    task = {"rate_bps": 8e6, "rtt_s": 0.05, "loss": loss, "seed": 3}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", LINE_TEST],
        input=json.dumps(task), capture_output=True, text=True, timeout=HANGS_S, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["equal"]
    assert found["reply"] == f"done {line.THERE}", "the server sees the far end's address"
    assert found["dialled"] >= 0.05 or loss, "a handshake takes a round trip"
    assert found["took"] >= 512_000 * 8 / 8e6


async def test_a_socket_counts_what_is_between_two_readings(tiny):
    sender = Sender(tiny, added_bytes=added_by_grpc)
    transfer = sender.pack(sender.read(TEXT), QUESTION, "int8")
    server = Server("127.0.0.1:0", receiver=ReceiverService(Receiver(tiny)))
    port = await server.start()
    async with ReceiverClient(f"127.0.0.1:{port}") as client:
        before = client.socket_count()
        if before is None:
            pytest.skip("the kernel's counters cannot be read here")
        async for _ in client.push(transfer.frames):
            pass
        await asyncio.sleep(0.05)
        count = client.socket_count().since(before)
    await server.stop(0)
    # Whatever is not acknowledged at the second reading was acknowledged from before the first, or is on its way.
    assert abs(count.bytes_acked - (count.bytes_sent - count.bytes_retransmitted)) < 1000
    assert transfer.receipt.wire_bytes <= count.bytes_acked <= transfer.receipt.wire_bytes + 1000
    assert count.segments_out >= count.data_segments_out > 0
    assert count.segments_in > 0
    assert count.segment_bytes > 500
