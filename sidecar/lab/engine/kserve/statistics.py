"""Counts of requests per model, for ModelStatistics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """Requests that ended well and badly, and responses in all."""

    succeeded: int = 0
    failed: int = 0
    responses: int = 0

    def count(self, succeeded: bool, final: bool) -> None:
        """Note one response; a final one ends its request."""
        self.responses += 1
        if final and succeeded:
            self.succeeded += 1
        elif final:
            self.failed += 1
