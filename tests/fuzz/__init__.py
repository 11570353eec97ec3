"""What `make fuzz` runs: everything that parses under a coverage-guided fuzzer, and agents under random messages."""
