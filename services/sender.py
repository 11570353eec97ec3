"""Entry point of the sender agent: `python services/sender.py` is `kvlink sender`."""

import sys

from kvlink.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sender")
    main()
