"""The journal: what the core was told, kept in segments, and run again."""
