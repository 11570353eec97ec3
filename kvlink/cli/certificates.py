"""Commands that make, add to, renew and show the credentials of a network of agents.

Does not know: how certificates are made. Place on the path: the face of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink import errors
from kvlink.cli.configuration import Command
from kvlink.cli.kinds import File, MemberText, Real, Text
from kvlink.cli.options import Json, option
from kvlink.defaults import CERTIFICATE_DAYS, RECEIVER, SENDER
from kvlink.terminal import say, say_json

app = typer.Typer(no_args_is_help=True, help="Certificates and tokens for agents and their clients.")

Network = Annotated[
    Path,
    typer.Argument(
        parser=File(), metavar="FOLDER", help="Folder of the network: one folder a peer, and authority/."
    ),
]
Days = Annotated[float, option("days", Real(0, 36_500, above=True), "Days that certificates are valid.")]
Senders = Annotated[list[str] | None, option("sender", MemberText(), "A sender; repeat.")]
Receivers = Annotated[list[str] | None, option("receiver", MemberText(), "A receiver; repeat.")]
Clients = Annotated[list[str] | None, option("client", Text("name"), "Who only calls; repeat.")]


@app.command(cls=Command)
def init(
    network: Network,
    sender: Senders = None,
    receiver: Receivers = None,
    client: Clients = None,
    days: Days = CERTIFICATE_DAYS,
) -> None:
    """Make an authority, and credentials for every peer. Default: sender, receiver and client on loopback."""
    from kvlink.transport import certs

    members = _members(sender, receiver, client)
    if not members:
        members = _members([f"sender={SENDER}"], [f"receiver={RECEIVER}"], ["client"])
    _tell(certs.begin(network, members, days))


@app.command(cls=Command)
def add(
    network: Network,
    sender: Senders = None,
    receiver: Receivers = None,
    client: Clients = None,
    days: Days = CERTIFICATE_DAYS,
) -> None:
    """Add peers to a network; the others know them at once, once they have their new peers.toml."""
    from kvlink.transport import certs

    members = _members(sender, receiver, client)
    if not members:
        raise errors.ConfigError("say whom to add: --sender, --receiver or --client")
    _tell([certs.add(network, member, days) for member in members])


@app.command(cls=Command)
def renew(network: Network, days: Days = CERTIFICATE_DAYS) -> None:
    """New keys and certificates for every peer; running agents take them up without a restart."""
    from kvlink.transport import certs

    for name, until in certs.renew(network, days):
        say(f"{name}: valid until {until:%Y-%m-%d %H:%M} UTC")


@app.command(cls=Command)
def show(
    folder: Annotated[Path, typer.Argument(parser=File(), metavar="FOLDER", help="Folder of one peer.")],
    as_json: Json = False,
) -> None:
    """Say who a folder makes one, until when, whom it dials and who may call it. Shows no secret."""
    from kvlink.transport.credentials import Credentials

    told = Credentials(folder).describe()
    if as_json:
        say_json(told)
        return
    state = "expired at" if told["expired"] else "valid until"
    say(f"{told['name']}: {state} {told['valid_until']}")
    for address, name in told["dials"].items():
        say(f"dials  {address} as {name}")
    for name, rights in told["lets_in"].items():
        say(f"admits {name}: {', '.join(rights)}")


def _members(sender: list[str] | None, receiver: list[str] | None, client: list[str] | None) -> list[Any]:
    from kvlink.transport.certs import Member

    found = [("receiver", text) for text in receiver or ()] + [("sender", text) for text in sender or ()]
    members = []
    for kind, text in found:
        name, _, address = text.partition("=")
        members.append(Member(name, kind, address))  # type: ignore[arg-type]
    return [*members, *(Member(name, "client") for name in client or ())]


def _tell(folders: list[Path]) -> None:
    for folder in folders:
        say(f"{folder}: give it to {folder.name}, and to nobody else")
