"""The decisions: `step(event, now_ns) -> effects`. One writer, no I/O, no clock."""
