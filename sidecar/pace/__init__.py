"""The time of an engine's step: published tables, a plane through them, and the pace of a configured engine."""
