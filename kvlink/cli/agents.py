"""Commands that run and look at agents: receiver, sender, health.

Does not know: what an agent does. Place on the path: the face of the package.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvlink import errors
from kvlink.cli.common import (
    RECEIVER,
    SENDER,
    Attn,
    Device,
    Dtype,
    Insecure,
    Json,
    Listen,
    LogLevel,
    Model,
    budget_bytes,
    quiet,
    run,
    set_up_log,
)


def receiver(
    listen: Listen = RECEIVER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    insecure: Insecure = False,
    max_held: Annotated[str, typer.Option(help="Memory for held caches.")] = "8000MB",
    cache_lifetime_s: Annotated[float, typer.Option(help="Seconds that a cache is held.")] = 3600.0,
    max_transfers: Annotated[int, typer.Option(min=1, help="Transfers at a time.")] = 32,
    log_level: LogLevel = "warning",
) -> None:
    """Run a receiver: it takes caches and answers from them."""
    from kvlink.agent.receiver import Receiver
    from kvlink.agent.receiver_service import ReceiverService, ReceiverSettings
    from kvlink.transport.server import Server, check_listen

    set_up_log(log_level)
    quiet()
    settings = ReceiverSettings(
        max_held_bytes=budget_bytes(max_held), cache_lifetime_s=cache_lifetime_s, max_transfers=max_transfers
    )

    async def serve() -> None:
        # Refuse an address before a model is loaded for it.
        check_listen(listen, insecure)
        service = ReceiverService(Receiver(model, device=device, dtype=dtype, attention=attn), settings)
        await Server(listen, receiver=service, insecure=insecure).run(
            _announce("receiver", listen, model), service.sweep
        )

    run(serve())


def sender(
    listen: Listen = SENDER,
    model: Model = "kvlink-tiny",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    insecure: Insecure = False,
    press: Annotated[
        bool, typer.Option("--press", help="Let recipes name classes of kvpress, which imports it.")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Receiver that may be dialled, host:port; repeat.")
    ] = None,
    max_held: Annotated[str, typer.Option(help="Memory for published contexts.")] = "8000MB",
    context_lifetime_s: Annotated[float, typer.Option(help="Seconds that a context is held.")] = 3600.0,
    log_level: LogLevel = "warning",
) -> None:
    """Run a sender: it reads contexts and delivers what questions need of them."""
    from kvlink.agent.sender import Sender
    from kvlink.agent.sender_service import LOOPBACK_PEERS, SenderService, SenderSettings
    from kvlink.transport.server import Server, check_listen

    set_up_log(log_level)
    quiet()
    settings = SenderSettings(
        presses=press,
        max_held_bytes=budget_bytes(max_held),
        context_lifetime_s=context_lifetime_s,
        peers=tuple(peer) if peer else LOOPBACK_PEERS,
    )

    async def serve() -> None:
        check_listen(listen, insecure)
        service = SenderService(Sender(model, device=device, dtype=dtype, attention=attn), settings)
        await Server(listen, sender=service, insecure=insecure).run(
            _announce("sender", listen, model), service.sweep
        )

    run(serve())


def _announce(kind: str, listen: str, model: str) -> Any:
    host = listen.rpartition(":")[0]
    return lambda port: print(f"kvlink {kind} with {model} listens on {host}:{port}", flush=True)


def health(
    address: str,
    as_json: Json = False,
) -> None:
    """Ask an agent whether it serves, and what it is."""
    from kvlink.show import print_json
    from kvlink.transport.client import ReceiverClient, SenderClient

    async def work() -> dict[str, Any]:
        for kind, client in (("receiver", ReceiverClient), ("sender", SenderClient)):
            async with client(address) as peer:
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
        print_json(told)
    else:
        print(
            f"{told['agent']} at {address}: {told['status']}, {told['model']} ({told['dtype']}), kvlink {told['release']}"
        )
    if told["status"] != "SERVING":
        raise typer.Exit(1)
