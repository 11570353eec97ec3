"""Spans on their way to a collector: in batches, in the background, and never in anybody's way.

Does not know: what a span says. Place on the path: ground floor, under the observer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from kvlink.errors import ConfigError
from kvlink.quoting import shown

log = logging.getLogger("kvlink.trace")

_EXPORT_S, _CLOSE_S, _REMIND_S = 2.0, 2.0, 60.0


def needed(module: str, extra: str) -> Any:
    """A module of an extra. Raises ConfigError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs the extra {extra!r}: pip install 'kvlink[{extra}]'") from error


def open_tracer(kind: str, trace_to: str) -> tuple[Any, Callable[[], None]]:
    """A tracer whose spans go to a URL (OTLP over HTTP), and what sends the last of them.

    A collector that is down or silent costs spans, a line in the log now and then, and at most `_CLOSE_S`
    at the end. Raises ConfigError where the extra is missing or this is no URL.
    """
    sdk = needed("opentelemetry.sdk.trace", "trace")
    export = needed("opentelemetry.sdk.trace.export", "trace")
    otlp = needed("opentelemetry.exporter.otlp.proto.http.trace_exporter", "trace")
    resources = needed("opentelemetry.sdk.resources", "trace")
    at = urlsplit(trace_to)
    if at.scheme not in ("http", "https") or not at.hostname:
        raise ConfigError(f"expected the http or https URL of a collector, got {trace_to!r}")
    where = shown(f"{at.hostname}:{at.port}" if at.port else at.hostname)
    made = otlp.OTLPSpanExporter(endpoint=trace_to, timeout=_EXPORT_S)
    resource = resources.Resource.create({"service.name": f"kvlink-{kind}"})
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(_quiet(made, export, where)))
    # What the library notes of each failure, with a traceback, is said in one line here.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def close() -> None:
        worker = threading.Thread(target=provider.shutdown, daemon=True)
        worker.start()
        worker.join(_CLOSE_S)
        if worker.is_alive():
            log.warning("the last spans are lost: the collector at %s does not answer", where)

    return provider.get_tracer("kvlink"), close


def _quiet(made: Any, export: Any, where: str) -> Any:
    """An exporter whose failures are one line a minute."""

    class Quiet(export.SpanExporter):  # type: ignore[misc]
        said_at = -_REMIND_S

        def export(self, spans: Any) -> Any:
            try:
                result = made.export(spans)
            except Exception as error:  # whatever a library raises costs spans, not the agent
                result, why = export.SpanExportResult.FAILURE, f": {type(error).__name__}"
            else:
                why = ""
            if result is not export.SpanExportResult.SUCCESS and time.monotonic() - self.said_at > _REMIND_S:
                self.said_at = time.monotonic()
                log.warning("spans are lost: the collector at %s does not take them%s", where, why)
            return result

        def shutdown(self) -> None:
            made.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return True

    return Quiet()
