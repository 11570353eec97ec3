"""The release, in one place."""

RELEASE = "0.1.0"
