"""An ordering policy that is asked again and again at one moment ends, whatever an engine can open and send."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from policies.ordering.credit import Credit
from policies.ordering.fifo import Fifo
from policies.ordering.skip import Skip
from policies.ordering.soft_gated import SoftGated
from policies.views import BASE, Close, Open, Promise, Send, Waiting

POLICIES = (Credit, Fifo, Skip, SoftGated)
DECISIONS_MAX = 300
"""More than all requests, opened and closed versions of a world together."""
MOMENTS = 60
NEVER_NS = 1 << 60


@dataclass
class Slot:
    running: int = 0
    opened_ns: int = 0
    pages: int = 1
    loading: bool = False


class Engine:
    """An engine with few pages. Some versions are in it, some are in the store, and some cannot be sent just now."""

    backend = "b"

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.versions = [f"v{number}" for number in range(draw.randint(2, 6))] + [BASE] * draw.randint(0, 1)
        self.seats, self.pages = draw.randint(1, 6), draw.randint(1, 4)
        self.open: dict[str, Slot] = {}
        self.queued: dict[int, str] = {}
        self.resident: set[str] = set()
        self.ready: set[str] = set()
        self.stuck: set[str] = set()
        self.loads = True
        self.base_running = 0
        self.change()

    def change(self) -> None:
        """Let time pass: loads and runs end, the engine and the store hold other versions."""
        for version, slot in self.open.items():
            if slot.loading and self.draw.random() < 0.5:
                slot.loading = False
                self.resident.add(version)
            slot.running -= slot.running > 0 and self.draw.random() < 0.7
        self.base_running -= self.base_running > 0 and self.draw.random() < 0.7
        if self.draw.random() < 0.3:
            self.resident = {version for version in self.versions if self.draw.random() < 0.6}
            self.ready = self.resident | {version for version in self.versions if self.draw.random() < 0.6}
            self.stuck = {version for version in self.versions if self.draw.random() < 0.1}
            self.loads = self.draw.random() < 0.5

    @property
    def seats_free(self) -> int:
        return self.seats - self.base_running - sum(slot.running + slot.loading for slot in self.open.values())

    def is_busy(self, version: str) -> bool:
        slot = self.open[version]
        return slot.running > 0 or slot.loading or version in self.queued.values()

    @property
    def pages_free(self) -> int:
        return self.pages - sum(map(self.is_busy, self.open))

    def is_ready(self, version: str) -> bool:
        return version == BASE or version in self.ready

    @property
    def at_hand(self) -> list[str]:
        found = [version for version in dict.fromkeys(self.queued.values()) if version in self.ready]
        self.draw.shuffle(found)
        return found

    def can_open(self, version: str) -> bool:
        is_here = version in self.ready and (self.loads or version in self.resident)
        return is_here and version not in self.open and self.pages_free > 0

    def can_send(self, request: int) -> bool:
        return self.seats_free > 0 and self.queued[request] not in self.stuck

    def begin(self, version: str) -> None:
        for idle in [other for other in self.open if not self.is_busy(other)]:
            if len(self.open) >= self.pages:
                del self.open[idle]
        self.open[version] = Slot(loading=version not in self.resident)

    def send(self, request: int) -> None:
        version = self.queued.pop(request)
        if version == BASE:
            self.base_running += 1
        else:
            self.open[version].running += 1


@pytest.mark.parametrize("policy_of", POLICIES)
def test_decisions_end(policy_of: type) -> None:
    """Seeds of before the mend went on for ever, closing and opening one version in turn."""
    for seed in range(600):
        draw = random.Random(seed)
        engine, policy, now_ns, number = Engine(draw), policy_of(), 0, 0
        for _ in range(MOMENTS):
            now_ns += draw.randint(0, 3000)
            engine.change()
            for _ in range(draw.randint(0, 4)):
                number += 1
                version = draw.choice(engine.versions)
                tenant = f"t{draw.randint(0, seed % 3)}"
                overdue_ns = draw.choice([100, 1000, 5000, NEVER_NS])
                urgent_ns = overdue_ns + draw.choice([0, 100, 3000])
                promise = Promise(overdue_ns, urgent_ns, overdue_ns, urgent_ns) if draw.random() < 0.8 else None
                policy.queued(Waiting(number, version, version, tenant, "default", now_ns, 5, 50), promise, now_ns)
                engine.queued[number] = version
            decided = 0
            while engine.queued and (decision := policy.choose(engine, now_ns)) is not None:
                decided += 1
                assert decided < DECISIONS_MAX, f"seed {seed}: {decision} in turns, of {engine.open}"
                match decision:
                    case Send(request=request):
                        engine.send(request)
                        policy.left(request, now_ns)
                    case Open(version=version):
                        engine.begin(version)
                    case Close(version=version):
                        del engine.open[version]
