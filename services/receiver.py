"""Entry point of the receiver agent: `python services/receiver.py` is `kvlink receiver`."""

from kvlink.cli import main

if __name__ == "__main__":
    main("receiver")
