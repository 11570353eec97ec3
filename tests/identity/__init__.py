"""What makes two models two, and what does not. `python -m tests.identity` prints the tables."""
