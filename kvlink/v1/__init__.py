"""Generated from proto/kvlink/v1; never edited."""
