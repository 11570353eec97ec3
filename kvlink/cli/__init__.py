"""The `kvlink` command.

Every option can also be set as `KVLINK_<COMMAND>_<OPTION>` or `KVLINK_<OPTION>` in the environment, or in a
TOML file given with `--config` (a table per command): see `cli.configuration`.

Exit codes: 0 done · 1 a check failed · 2 bad input · 3 model or identity · 4 link or peer ·
5 damaged or unexpected data · 6 a limit, an unknown id, or not allowed.

Does not know: how anything is done. Place on the path: outside it; imports lazily, so that
`kvlink --help` needs no torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink import errors
from kvlink._release import RELEASE
from kvlink.cli import agents, asking, bench, certificates, evaluating, files, models, profiles
from kvlink.cli.configuration import Command, configure
from kvlink.cli.kinds import File
from kvlink.terminal import drop_output, note, open_standard_streams, say

_HELP = """One agent hands over what it has read: selected, compressed KV caches over gRPC.

Every option can also be set as KVLINK_<COMMAND>_<OPTION> or KVLINK_<OPTION> in the environment, or in a TOML
file given with --config (a table per command): the command line wins over the environment, that over the file.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 model or identity, 4 link or peer, 5 damaged or
unexpected data, 6 a limit, an unknown id, or not allowed.
"""

_UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
"""Of click, or of typer's own copy of it, whichever this release of typer has."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
for command in (
    asking.demo,
    agents.sender,
    agents.receiver,
    asking.ask,
    files.publish,
    files.unpublish,
    files.fetch,
    files.pack,
    files.unpack,
    files.inspect,
    agents.health,
):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluating.evaluate)
app.add_typer(models.app, name="models")
app.add_typer(profiles.app, name="profile")
app.add_typer(certificates.app, name="certs")
app.add_typer(bench.app, name="bench")

EXIT_CODES: dict[type[errors.KvlinkError], int] = {
    errors.InputError: 2,
    errors.ModelError: 3,
    errors.IdentityError: 3,
    errors.TransportError: 4,
    errors.DataError: 5,
    errors.ProtocolError: 5,
    errors.LimitError: 6,
    errors.NotFoundError: 6,
    errors.AccessError: 6,
}


@app.callback(invoke_without_command=True, help=_HELP)
def root(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(parser=File(), metavar="FILE", help="TOML file with a table per command.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the release and stop.")] = False,
) -> None:
    if version:
        say(f"kvlink {RELEASE}")
        raise typer.Exit
    configure(context, config)


def main(command: str = "") -> None:
    """Run the command; errors of the package become a line on standard error and an exit code.

    `command`: of an entry point that is one command only; `--config FILE` may still stand first.
    """
    open_standard_streams()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it notes on standard error we say ourselves
    # Kernels are kept by shape, and each length of a text is a shape: of the 1024 of every thread and the 1024 of
    # all, an agent has a gigabyte after some thousand calls. Generating needs fewer than ten.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        ended = app(_placed(command, sys.argv[1:]), standalone_mode=False)
    except errors.KvlinkError as error:
        hint = f" (in {error.retry_after_s:g} s)" if error.retry_after_s else ""
        note(f"kvlink: {type(error).__name__}: {error}{hint}")
        raise SystemExit(exit_code(error)) from None
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that has said its part
            note(f"kvlink: {error.format_message()} ('kvlink --help', 'kvlink COMMAND --help')")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:  # of help that cannot be written: the system's own words
        drop_output()
        note(f"kvlink: {error}")
        raise SystemExit(2) from None
    raise SystemExit(ended if isinstance(ended, int) else 0)


def _placed(command: str, words: list[str]) -> list[str]:
    """The words with `command` behind the options of `kvlink` itself."""
    at = 0
    while command and at < len(words) and words[at].partition("=")[0] in ("--config", "--version"):
        at += 2 if words[at] == "--config" else 1
    return [*words[:at], command, *words[at:]] if command else words


def exit_code(error: errors.KvlinkError) -> int:
    return next((code for cls, code in EXIT_CODES.items() if isinstance(error, cls)), 1)
