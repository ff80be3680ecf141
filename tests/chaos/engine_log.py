"""What an engine was sent, by whom and under which epoch: its own log says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass
class EngineLog:
    """The log of one engine over all of its lives. `stale` counts what was sent under an epoch that had ended."""

    path: Path

    def stale(self) -> int:
        """Return how many requests came after one of a newer epoch."""
        count = newest = 0
        for epoch, _ in self.sent():
            count += epoch < newest
            newest = max(newest, epoch)
        return count

    def sent(self) -> list[tuple[int, str]]:
        """Return epoch and owner of everything that replicas sent, in the order in which the engine took it in."""
        lives: list[list[tuple[int, int, str]]] = [[]]
        seen: set[int] = set()
        for line in self.path.read_text().splitlines():
            served = json.loads(line)
            if served["sequence"] in seen:  # numbers begin anew with the process
                lives.append([])
                seen.clear()
            seen.add(served["sequence"])
            parameters = served["parameters"]
            if "lora_epoch" in parameters:
                lives[-1].append((served["sequence"], parameters["lora_epoch"], parameters["lora_owner"]))
        return [(epoch, owner) for life in lives for _, epoch, owner in sorted(life)]
