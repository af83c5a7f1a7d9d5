"""Somebody else's package: a world that paints, erasers and attacks that take no time, found by entry points."""
