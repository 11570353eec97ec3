"""Every decoder-only family that transformers can build small, through every kind of recipe."""
