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
from kvlink.cli.common import (
    RECEIVER,
    SENDER,
    Attn,
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
    StagingDir,
    TraceTo,
    budget_bytes,
    credentials,
    quiet,
    run,
    set_up_log,
)
from kvlink.observe import Observer
from kvlink.quoting import shown
from kvlink.terminal import say, say_json


def receiver(
    listen: Listen = RECEIVER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    creds: Creds = None,
    insecure: Insecure = False,
    max_held: Annotated[str, typer.Option(help="Memory for held caches.")] = "8000MB",
    max_peer_held: Annotated[str, typer.Option(help="Of it for one peer; empty: all.")] = "",
    max_cache: Annotated[str, typer.Option(help="Memory of one cache.")] = "4000MB",
    cache_lifetime_s: Annotated[float, typer.Option(help="Seconds that a cache is held.")] = 3600.0,
    resume_lifetime_s: Annotated[float, typer.Option(help="Seconds to resume a broken transfer in.")] = 120.0,
    transfer_deadline_s: Annotated[float, typer.Option(help="Seconds from first frame to last.")] = 900.0,
    max_transfers: Annotated[int, typer.Option(min=1, help="Transfers at a time.")] = 32,
    max_peer_transfers: Annotated[int, typer.Option(min=0, help="Of them by one peer; 0: all.")] = 0,
    max_generations: Annotated[int, typer.Option(min=1, help="Generations at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=0, help="Callers that may wait for a place.")] = 64,
    wait_s: Annotated[float, typer.Option(help="Seconds that they wait at most.")] = 10.0,
    staging: StagingDir = None,
    durable_every: Annotated[str, typer.Option(help="Bytes after which frames are made durable.")] = "1MB",
    metrics: MetricsAt = "",
    trace_to: TraceTo = "",
    log_level: LogLevel = "warning",
    log_format: LogFormat = "text",
) -> None:
    """Run a receiver: it takes caches and answers from them."""
    set_up_log(log_level, log_format)
    proof = _proof(listen, creds, insecure)
    from kvlink.agent.receiver import Receiver
    from kvlink.agent.receiver_service import ReceiverService
    from kvlink.agent.settings import ReceiverSettings
    from kvlink.wire.session import Limits

    quiet()
    settings = ReceiverSettings(
        max_held_bytes=budget_bytes(max_held),
        max_peer_bytes=budget_bytes(max_peer_held),
        cache_lifetime_s=cache_lifetime_s,
        resume_lifetime_s=resume_lifetime_s,
        transfer_deadline_s=transfer_deadline_s,
        max_transfers=max_transfers,
        max_peer_transfers=max_peer_transfers,
        max_generations=max_generations,
        max_new_tokens=max_new_tokens,
        max_waiting=max_waiting,
        wait_s=wait_s,
        staging=staging,
        durable_bytes=budget_bytes(durable_every),
        limits=Limits(max_cache_bytes=budget_bytes(max_cache)),
    )

    def make(observer: Observer) -> Any:
        return ReceiverService(
            Receiver(model, device=device, dtype=dtype, attention=attn), settings, observer
        )

    _serve("receiver", listen, model, make, proof, insecure, metrics, trace_to)


def sender(
    listen: Listen = SENDER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    creds: Creds = None,
    insecure: Insecure = False,
    press: Annotated[
        bool, typer.Option("--press", help="Let recipes name classes of kvpress, which imports it.")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Receiver that may be dialled, host:port; repeat.")
    ] = None,
    max_held: Annotated[str, typer.Option(help="Memory for published contexts.")] = "8000MB",
    max_peer_held: Annotated[str, typer.Option(help="Of it for one peer; empty: all.")] = "",
    context_lifetime_s: Annotated[float, typer.Option(help="Seconds that a context is held.")] = 3600.0,
    resume_lifetime_s: Annotated[float, typer.Option(help="Seconds to resume a broken delivery in.")] = 120.0,
    max_reads: Annotated[int, typer.Option(min=1, help="Contexts read or packed at a time.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="Callers that may wait for a place.")] = 64,
    wait_s: Annotated[float, typer.Option(help="Seconds that they wait at most.")] = 10.0,
    staging: StagingDir = None,
    metrics: MetricsAt = "",
    trace_to: TraceTo = "",
    log_level: LogLevel = "warning",
    log_format: LogFormat = "text",
) -> None:
    """Run a sender: it reads contexts and delivers what questions need of them."""
    set_up_log(log_level, log_format)
    proof = _proof(listen, creds, insecure)
    from kvlink.agent.sender import Sender
    from kvlink.agent.sender_service import SenderService
    from kvlink.agent.settings import SenderSettings

    quiet()
    settings = SenderSettings(
        presses=press,
        max_held_bytes=budget_bytes(max_held),
        max_peer_bytes=budget_bytes(max_peer_held),
        context_lifetime_s=context_lifetime_s,
        resume_lifetime_s=resume_lifetime_s,
        max_reads=max_reads,
        max_waiting=max_waiting,
        wait_s=wait_s,
        staging=staging,
        peers=tuple(peer or ()),
        insecure=insecure,
        credentials=proof,
    )

    def make(observer: Observer) -> Any:
        return SenderService(Sender(model, device=device, dtype=dtype, attention=attn), settings, observer)

    _serve("sender", listen, model, make, proof, insecure, metrics, trace_to)


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
) -> None:
    """Run an agent until it is told to stop."""
    from kvlink.transport.address import Address
    from kvlink.transport.server import Server

    at = Address.parse(listen, listening=True)
    observer = Observer(kind, metrics=bool(metrics), trace_to=trace_to)
    stop_metrics = (
        observer.serve(*astuple(Address.parse(metrics, listening=True))) if metrics else lambda: None
    )

    def started(port: int) -> None:
        how = f", as {proof.name!r} over TLS" if proof else ""
        say(f"kvlink {kind} with {shown(model)} listens on {replace(at, port=port)}{how}")

    async def serve() -> None:
        service = make(observer)
        handler: Any = {kind: service}
        await Server(listen, **handler, insecure=insecure, credentials=proof).run(started, service.sweep)

    try:
        run(serve())
    finally:
        stop_metrics()


def health(
    address: str,
    creds: Creds = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Ask an agent whether it serves, and what it is."""
    from kvlink.transport.client import ReceiverClient, SenderClient

    proof = credentials(creds, insecure)

    async def work() -> dict[str, Any]:
        for kind, client in (("receiver", ReceiverClient), ("sender", SenderClient)):
            async with client(address, proof, insecure=insecure) as peer:
                status = await peer.health()
                try:
                    there = await peer.capabilities()
                except errors.RemoteProtocolError:
                    continue
                return {
                    "address": address,
                    "agent": kind,
                    "status": status,
                    "model": there.model_name,
                    "dtype": there.dtype,
                    "release": there.release,
                    "protocol": [there.protocol_min, there.protocol_max],
                    "weights": there.fingerprint.weights.hex(),
                }
        raise errors.RemoteProtocolError(f"{address} is no kvlink agent")

    told = run(work())
    if as_json:
        say_json(told)
    else:
        found = {name: shown(value) for name, value in told.items()}
        say(
            f"{found['agent']} at {found['address']}: {found['status']}, {found['model']} ({found['dtype']}), "
            f"kvlink {found['release']}"
        )
    if told["status"] != "SERVING":
        raise typer.Exit(1)
