"""The two agents: the only room that sees every other, and where each path is read top to bottom."""
