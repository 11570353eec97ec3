"""Entry point of the receiver agent: `python services/receiver.py` is `kvlink receiver`."""

import sys

from kvlink.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "receiver")
    main()
