"""Who calls, what it may do, how much of it, and the record of it. See README.md."""
