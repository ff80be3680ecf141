"""Decide and remember: `step(event, now_ns) -> effects`, one writer, no I/O and no clock."""
