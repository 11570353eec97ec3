"""Commands that run and look at agents: receiver, sender, health.

Does not know: what an agent does. Place on the path: the face of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink import errors
from kvlink.agent.settings import ReceiverSettings, SenderSettings
from kvlink.cli.common import credentials, quiet, run, set_up_log
from kvlink.cli.ending import end_while_loading, end_within
from kvlink.cli.kinds import AddressText
from kvlink.cli.options import (
    Attention,
    Creds,
    Device,
    Dtype,
    Insecure,
    Json,
    Listen,
    LogFormat,
    LogLevel,
    MetricsAt,
    Model,
    TemplateOptions,
    TraceTo,
)
from kvlink.cli.settings import has_settings, settings_from
from kvlink.defaults import ATTENTION, DEVICE, DTYPE, MODEL, RECEIVER, SENDER
from kvlink.observe import Observer
from kvlink.quoting import shown
from kvlink.terminal import note, say, say_json


@has_settings(ReceiverSettings)
def receiver(
    listen: Listen = RECEIVER,
    model: Model = MODEL,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    template_options: TemplateOptions = "",
    creds: Creds = None,
    insecure: Insecure = False,
    metrics: MetricsAt = "",
    trace_to: TraceTo = "",
    log_level: LogLevel = "warning",
    log_format: LogFormat = "text",
    **bounds: Any,
) -> None:
    """Run a receiver: it takes caches and answers from them."""
    end_while_loading()
    set_up_log(log_level, log_format)
    proof = _proof(listen, creds, insecure)
    settings = settings_from(ReceiverSettings, bounds, credentials=proof)
    from kvlink.agent.receiver import Receiver
    from kvlink.agent.receiver_service import ReceiverService
    from kvlink.transport.dial import to_senders
    from kvlink.transport.link import added_by_grpc

    quiet()

    def make(observer: Observer) -> Any:
        return ReceiverService(
            Receiver(
                model,
                added_bytes=added_by_grpc,
                device=device,
                dtype=dtype,
                attention=attention,
                template_options=template_options,
            ),
            settings,
            observer,
            to_senders(proof, insecure=insecure),
        )

    _serve("receiver", listen, model, make, proof, insecure, metrics, trace_to, settings)


@has_settings(SenderSettings)
def sender(
    listen: Listen = SENDER,
    model: Model = MODEL,
    device: Device = DEVICE,
    dtype: Dtype = DTYPE,
    attention: Attention = ATTENTION,
    template_options: TemplateOptions = "",
    creds: Creds = None,
    insecure: Insecure = False,
    metrics: MetricsAt = "",
    trace_to: TraceTo = "",
    log_level: LogLevel = "warning",
    log_format: LogFormat = "text",
    **bounds: Any,
) -> None:
    """Run a sender: it reads contexts and delivers what questions need of them."""
    end_while_loading()
    set_up_log(log_level, log_format)
    proof = _proof(listen, creds, insecure)
    settings = settings_from(SenderSettings, bounds, credentials=proof)
    from kvlink.agent.sender import Sender
    from kvlink.agent.sender_service import SenderService
    from kvlink.transport.dial import to_receivers
    from kvlink.transport.link import added_by_grpc

    quiet()

    def make(observer: Observer) -> Any:
        return SenderService(
            Sender(
                model,
                added_bytes=added_by_grpc,
                device=device,
                dtype=dtype,
                attention=attention,
                template_options=template_options,
            ),
            settings,
            observer,
            to_receivers(proof, insecure=insecure),
        )

    _serve("sender", listen, model, make, proof, insecure, metrics, trace_to, settings)


def _proof(listen: str, creds: Path | None, insecure: bool) -> Any:
    """The agent's credentials, or None. An address that needs some is refused before a model is loaded."""
    from kvlink.transport.address import Address

    at, proof = Address.parse(listen, listening=True), credentials(creds, insecure)
    if proof is None:
        at.check_open(insecure)
    return proof


def _serve(
    kind: str,
    listen: str,
    model: str,
    make: Callable[[Observer], Any],
    proof: Any,
    insecure: bool,
    metrics: str,
    trace_to: str,
    settings: ReceiverSettings | SenderSettings,
) -> None:
    """Run an agent until it is told to stop."""
    from kvlink.transport.address import Address
    from kvlink.transport.server import Server

    at, advertised = Address.parse(listen, listening=True), settings.advertised_address
    observer = Observer(kind, metrics=bool(metrics), trace_to=trace_to)
    stop_metrics = (
        observer.serve(*astuple(Address.parse(metrics, listening=True))) if metrics else lambda: None
    )

    def started(port: int) -> None:
        how = f", as {proof.name!r} over TLS" if proof else ""
        known_as = f", others reach it at {advertised}" if advertised else ""
        say(f"kvlink {kind} with {shown(model)} listens on {replace(at, port=port)}{how}{known_as}")
        if at.is_any and not advertised:
            note(
                f"kvlink {kind}: {at.host} is every address of this machine and no name that others reach it by: "
                "give --advertise HOST:PORT, which handles and its capabilities then say"
            )

    async def serve() -> None:
        service = make(observer)

        def sweep() -> None:
            service.sweep()
            if proof:
                proof.remind()

        if proof:
            about = "Seconds until this agent's certificate expires"
            observer.watch("certificate_expires_in_seconds", about, lambda: proof.expires_in_s)
        handler: Any = {kind: service}
        server = Server(listen, **handler, insecure=insecure, credentials=proof)
        await server.run(started, sweep, lambda: end_within(settings.stop_s), settings.stop_s * _DRAIN)

    try:
        run(serve())
    finally:
        stop_metrics()
        observer.close()


_DRAIN = 0.6
"""Of the time to stop; the rest is for last words, threads and spans."""


At = Annotated[str, typer.Argument(parser=AddressText(), metavar="HOST:PORT", help="Address of the agent.")]


def health(
    address: At,
    creds: Creds = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Ask an agent whether it serves, and what it is."""
    from kvlink.transport.address import Address
    from kvlink.transport.client import ReceiverClient, SenderClient
    from kvlink.transport.reach import expires_in_s

    proof = credentials(creds, insecure)

    async def work() -> dict[str, Any]:
        for kind, client in (("receiver", ReceiverClient), ("sender", SenderClient)):
            async with client(address, proof, insecure=insecure) as peer:
                status = await peer.health()
                try:
                    there = await peer.capabilities()
                except (errors.RemoteProtocolError, errors.ConfigError):  # it is another kind of agent
                    continue
                return {
                    "address": address,
                    "agent": kind,
                    "status": status,
                    "model": there.model_name,
                    "dtype": there.dtype,
                    "release": there.release,
                    "advertises": there.address,
                    "protocol": [there.spoken.protocol_min, there.spoken.protocol_max],
                    "weights": there.fingerprint.weights.hex(),
                }
        raise errors.RemoteProtocolError(f"{address} is no kvlink agent")

    told = run(work())
    if proof:
        seen = run(expires_in_s(Address.parse(address), proof))
        told["expires_in_s"] = None if seen is None else int(seen)
        told["own_expires_in_s"] = int(proof.expires_in_s)
    if as_json:
        say_json(told)
    else:
        found = {name: shown(value) for name, value in told.items()}
        say(
            f"{found['agent']} at {found['address']}: {found['status']}, {found['model']} ({found['dtype']}), "
            f"kvlink {found['release']}"
            + (f", others reach it at {found['advertises']}" if told["advertises"] else "")
            + (f", certificate expires in {told['expires_in_s']:,} s" if told.get("expires_in_s") else "")
        )
    if told["status"] != "SERVING":
        raise typer.Exit(1)
