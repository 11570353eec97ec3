"""`python -m kvlink` is the `kvlink` command."""

from __future__ import annotations


def main() -> None:
    try:
        from kvlink.cli import main as command  # here: Ctrl-C may come while it is being imported

        command()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
