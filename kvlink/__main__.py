"""`python -m kvlink` is the `kvlink` command."""

from __future__ import annotations


def main(command: str = "") -> None:
    """`command`: of an entry point that is one command only, such as an agent's."""
    try:
        from kvlink.cli import main as run  # here: Ctrl-C may come while it is being imported

        run(command)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
