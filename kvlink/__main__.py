"""`python -m kvlink` is the `kvlink` command."""

from kvlink.cli import main

main()
