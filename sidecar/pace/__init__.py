"""What an engine's step costs: published tables, a plane through them, and what is declared of an engine."""
