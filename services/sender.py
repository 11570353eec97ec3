"""Entry point of the sender agent: `python services/sender.py` is `kvlink sender`."""

from kvlink.__main__ import main

if __name__ == "__main__":
    main("sender")
