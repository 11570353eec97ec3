"""What an agent tells of itself while it runs: metrics, spans, structured logs.

An `Observer` counts for Prometheus where the extra `metrics` is installed, and opens OpenTelemetry
spans where `trace` is; else it does nothing. Nothing here ever sees a text, a token, a question, or an
id that opens something: transfer ids, names of peers, sizes and seconds only.

Does not know: what is observed. Place on the path: ground floor, beside it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kvlink.errors import ConfigError
from kvlink.quoting import LINE, json_text, shown
from kvlink.receipt import Receipt
from kvlink.tracing import needed, open_tracer

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_PARENT = "traceparent"


class Observer:
    """Counts and spans of one agent, `kind` sender or receiver."""

    def __init__(self, kind: str, *, metrics: bool = False, trace_to: str = "", tracer: Any = None) -> None:
        """`trace_to`: where spans are sent (OTLP over HTTP); `tracer`: an OpenTelemetry tracer instead.

        Raises ConfigError where an extra is missing.
        """
        self.kind = kind
        self._prometheus: Any = needed("prometheus_client", "metrics") if metrics else None
        self._registry: Any = None if self._prometheus is None else self._prometheus.CollectorRegistry()
        self._made: dict[str, Any] = {}
        self._tracer: Any = tracer
        self._close: Callable[[], None] = lambda: None
        if trace_to and tracer is None:
            self._tracer, self._close = open_tracer(kind, trace_to)

    def close(self) -> None:
        """Send the last spans, within a few seconds."""
        self._close()

    def count(self, name: str, help_text: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        if self._prometheus is not None:
            self._metric("Counter", name, help_text, labels).inc(value)

    def seconds(self, name: str, help_text: str, value: float, **labels: str) -> None:
        """Add to a histogram of seconds."""
        if self._prometheus is not None:
            self._metric("Histogram", name, help_text, labels, buckets=SECONDS).observe(value)

    def cost(self, name: str, receipt: Receipt) -> None:
        """Count what one complete transfer cost: its bytes by kind under `name`, its seconds by stage."""
        for kind, count in receipt.bytes.items():
            self.count(name, "Bytes of complete transfers", count, kind=kind)
        for stage, seconds in receipt.stage_s.items():
            self.stage(stage, seconds)

    def stage(self, name: str, seconds: float) -> None:
        """Add to the seconds of a stage of the path."""
        self.seconds("stage_seconds", "Seconds of a stage", seconds, stage=name)

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        if self._prometheus is not None:
            gauge = self._prometheus.Gauge(f"kvlink_{name}", help_text, registry=self._registry)
            gauge.set_function(read)

    def _metric(self, kind: str, name: str, help_text: str, labels: dict[str, str], **more: Any) -> Any:
        if name not in self._made:
            make = getattr(self._prometheus, kind)
            self._made[name] = make(
                f"kvlink_{name}", help_text, sorted(labels), registry=self._registry, **more
            )
        told = {key: shown(value) for key, value in labels.items()}
        return self._made[name].labels(**told) if labels else self._made[name]

    def text(self) -> str:
        """The metrics in Prometheus' text format."""
        if self._prometheus is None:
            return ""
        return str(self._prometheus.generate_latest(self._registry).decode())

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer `GET /metrics` there; returns what stops it. Raises ConfigError."""
        try:
            server, thread = self._prometheus.start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    @contextlib.contextmanager
    def span(self, name: str, parent: str = "", **attributes: Any) -> Iterator[Span]:
        """A span around a block, child of `parent` (a W3C traceparent) where one is given.

        It is not made the current one: blocks of coroutines take turns, and would end each other's.
        """
        told = Span()
        if self._tracer is None:
            yield told
            return
        propagation = needed("opentelemetry.trace.propagation.tracecontext", "trace")
        trace = needed("opentelemetry.trace", "trace")
        carrier = {_PARENT: parent} if parent else {}
        made = propagation.TraceContextTextMapPropagator()
        plain = {key: _attribute(value) for key, value in attributes.items()}
        span = self._tracer.start_span(name, context=made.extract(carrier), attributes=plain)
        made.inject(carrier, context=trace.set_span_in_context(span))
        told.parent = carrier.get(_PARENT, "")
        try:
            yield told
        except Exception as error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            for key, value in told.attributes.items():
                span.set_attribute(key, _attribute(value))
            span.end()


@dataclass(slots=True)
class Span:
    """A running span. `parent`: what a child needs to know of it; `attributes`: set when it ends."""

    parent: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


def _attribute(value: Any) -> Any:
    return shown(value) if isinstance(value, str) else value


def current_parent() -> str:
    """The W3C traceparent of the span around here; empty where there is none."""
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return ""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(_PARENT, "")


def _told(value: Any, depth: int = 3) -> Any:
    """A value of a record's `extra` with its words quoted, and no more of it than a line has room for."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping) and depth:
        return {shown(k): _told(v, depth - 1) for k, v in islice(value.items(), _MOST)}
    if isinstance(value, (list, tuple)) and depth:
        return [_told(v, depth - 1) for v in value[:_MOST]]
    return shown(value)


_MOST = 32
"""Entries of a mapping or list of a record's `extra`."""

_LONGEST = 4000
"""Characters of one line of the log: enough for a traceback."""


class _Lines(logging.Formatter):
    """What both formatters share: every word of a record quoted, on one line, of bounded length."""

    def message(self, record: logging.LogRecord) -> str:
        return shown(record.getMessage(), LINE)

    def formatException(self, ei: Any) -> str:
        """A traceback on one line: its lines are parted by bars."""
        return shown(" | ".join(super().formatException(ei).splitlines()), _LONGEST)


class TextLines(_Lines):
    """A log record as one line of text: time, level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        at = self.formatTime(record)
        line = f"{at} {record.levelname} {record.name} {self.message(record)}"
        return f"{line} | {self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(_Lines):
    """A log record as one JSON object a line: time, level, logger, message, and what `extra` gave."""

    _PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "at": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message(record),
        }
        told |= {key: _told(value) for key, value in vars(record).items() if key not in self._PLAIN}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json_text(told, ascii_only=True)
