"""What `make faults` runs: lines that break, peers that lie or die, load. `python -m tests.faults`."""
