"""Entry point of the receiver agent: `python services/receiver.py` is `kvlink receiver`."""

from kvlink.__main__ import main

if __name__ == "__main__":
    main("receiver")
