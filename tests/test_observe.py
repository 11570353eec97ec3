"""What agents tell of themselves: metrics, spans that join, logs as JSON."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.errors import ConfigError, RemoteProtocolError
from kvlink.observe import JsonLines, Observer, current_parent
from kvlink.transport.api import Ask, Delivery
from kvlink.transport.client import ReceiverClient, SenderClient
from kvlink.transport.dial import to_receivers
from kvlink.transport.server import Server
from tests.agent.conftest import QUESTION, TEXT
from tests.command import free_address
from tests.limits import HANGS_S


def test_an_observer_without_extras_does_nothing():
    observer = Observer("receiver")
    observer.count("x", "help")
    observer.seconds("y", "help", 1.0)
    observer.watch("z", "help", lambda: 1.0)
    with observer.span("deliver") as span:
        assert span.parent == ""
    assert observer.text() == ""
    assert current_parent() == ""


@pytest.mark.parametrize(
    ("options", "module", "extra"),
    [
        ({"metrics": True}, "prometheus_client", "metrics"),
        ({"trace_to": "http://127.0.0.1:1"}, "opentelemetry.sdk.trace", "trace"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, options, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'kvlink\[{extra}\]'"):
        Observer("receiver", **options)


async def both(lm, sender_observer: Observer, receiver_observer: Observer):
    """Two agents that are observed; their servers and addresses."""
    receiver = ReceiverService(Receiver(lm), observer=receiver_observer)
    sender = SenderService(Sender(lm), observer=sender_observer, dial=to_receivers())
    servers = [Server("127.0.0.1:0", receiver=receiver), Server("127.0.0.1:0", sender=sender)]
    return servers, [f"127.0.0.1:{await server.start()}" for server in servers]


async def test_metrics_count_what_happened(random_lm):
    observers = [Observer(kind, metrics=True) for kind in ("sender", "receiver")]
    servers, (receiver_at, sender_at) = await both(random_lm("qwen2", "bfloat16"), *observers)
    async with SenderClient(sender_at) as source, ReceiverClient(receiver_at) as target:
        last = [p async for p in source.deliver(Delivery(receiver_at, QUESTION, "int8", text=TEXT))][-1]
        tokens = len([p async for p in target.generate(Ask(last.cache_id, QUESTION))]) - 1
        with pytest.raises(RemoteProtocolError):
            [item async for item in target.push([b"nonsense"])]
    for server in servers:
        await server.stop(0)
    sent, received = (observer.text() for observer in observers)
    for text in (sent, received):
        assert 'kvlink_transfers_total{state="complete"} 1.0' in text
        for kind, count in last.receipt.bytes.items():
            assert f'_bytes_total{{kind="{kind}"}} {float(count)}' in text
    assert f"kvlink_generated_tokens_total {float(tokens)}" in received
    assert 'kvlink_stage_seconds_count{stage="decode"} 1.0' in received
    assert "kvlink_held_bytes " in received
    assert "kvlink_transfers_open 0.0" in received
    assert last.cache_id not in sent + received


def test_metrics_are_served_over_http_and_stop():
    observer = Observer("receiver", metrics=True)
    observer.count("transfers", "Transfers by their end", state="complete")
    with pytest.raises(ConfigError, match="cannot serve metrics on"):
        observer.serve("192.0.2.1", 1)
    host, port = free_address().split(":")
    stop = observer.serve(host, int(port))
    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as answer:
        assert b"kvlink_transfers_total" in answer.read()
    stop()
    with pytest.raises(OSError):  # noqa: PT011 - whatever the system calls it
        urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=HANGS_S)


async def test_spans_join_across_both_agents_under_the_callers(random_lm):
    exporter = InMemorySpanExporter()
    tracers = []
    for name in ("caller", "sender", "receiver"):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracers.append(provider.get_tracer(name))
    observers = [Observer(kind, tracer=tracer) for kind, tracer in zip(("s", "r"), tracers[1:], strict=True)]
    servers, (receiver_at, sender_at) = await both(random_lm("qwen2", "bfloat16"), *observers)
    async with SenderClient(sender_at) as source, ReceiverClient(receiver_at) as target:
        with tracers[0].start_as_current_span("question"):
            last = [p async for p in source.deliver(Delivery(receiver_at, QUESTION, "int8", text=TEXT))][-1]
            [p async for p in target.generate(Ask(last.cache_id, QUESTION))]
    for server in servers:
        await server.stop(0)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"question", "deliver", "pack", "receive", "generate"}
    assert len({span.context.trace_id for span in spans.values()}) == 1
    above = {name: span.parent.span_id if span.parent else None for name, span in spans.items()}
    ids = {name: span.context.span_id for name, span in spans.items()}
    assert above["deliver"] == above["generate"] == ids["question"]
    assert above["pack"] == above["receive"] == ids["deliver"]
    assert spans["receive"].attributes["state"] == "complete"
    assert spans["receive"].attributes["transfer"] == last.receipt.transfer_id
    said = json.dumps([dict(span.attributes) for span in spans.values()])
    assert last.cache_id not in said
    assert "Tavik" not in said


def test_json_lines_carry_what_extra_gave_and_the_exception():
    record = logging.getLogger("kvlink.x").makeRecord(
        "kvlink.x",
        logging.INFO,
        __file__,
        1,
        "took %d",
        (3,),
        None,
        extra={"transfer": "ab", "receipt": {"a": 1}},
    )
    told = json.loads(JsonLines().format(record))
    assert (told["level"], told["logger"], told["message"]) == ("info", "kvlink.x", "took 3")
    assert (told["transfer"], told["receipt"]) == ("ab", {"a": 1})
    assert told["at"].endswith("Z")
    try:
        raise ConfigError("no")
    except ConfigError:
        record.exc_info = sys.exc_info()
    assert "ConfigError: no" in json.loads(JsonLines().format(record))["error"]
