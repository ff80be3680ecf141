"""Count what is in flight at each engine and what is in the store, from events and effects alone.

The counts are independent of the core's own: both are unlikely to be wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from sidecar.core import effects as do
from sidecar.core.facts import EngineFacts
from tests.worlds.violation import hold


@dataclass
class BackendInFlight:
    """One backend, as the core was told that it is."""

    facts: EngineFacts
    seats: int
    down: bool = True
    draining: bool = False
    runs: dict[tuple[int, int], int] = field(default_factory=dict)
    """(request, attempt) → task id."""
    kv_tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    """Load → task id."""
    pages: dict[int, int] = field(default_factory=dict)
    """The pages of every adapter loaded in this life of the engine, by task id."""

    def clear(self) -> None:
        for held in (self.runs, self.kv_tokens, self.loads, self.pages):
            held.clear()

    def check(self, backend: str) -> None:
        """Check the seats, the pages and the KV tokens in flight."""
        in_flight = len(self.runs) + len(self.loads)
        hold(in_flight <= self.seats, f"{backend}: {in_flight} in flight and {self.seats} may be")
        tasks = dict.fromkeys((*self.runs.values(), *self.loads.values()))
        pages, host = sum(self.pages.get(task, 0) for task in tasks), self.facts.host_pages
        hold(host is None or pages <= host, f"{backend}: {pages} pages in flight and the engine has {host}")
        slots = self.facts.device_pages if self.facts.reads_files else None
        hold(slots is None or pages <= slots, f"{backend}: {pages} adapters in flight and the engine has {slots} slots")
        tokens, capacity = sum(self.kv_tokens.values()), self.facts.kv_tokens
        fits = capacity is None or tokens <= capacity or len(self.runs) == 1
        hold(fits, f"{backend}: {tokens} KV tokens in flight and it holds {capacity}")


class InFlight:
    """The runs and loads in flight at every backend."""

    def __init__(self, seat_slack: float) -> None:
        self._seat_slack = seat_slack
        self.backends: dict[str, BackendInFlight] = {}
        self._answered: dict[int, None] = {}
        """Task ids that have answered anywhere: they are off probation."""
        self._at: dict[int, str] = {}
        """The backend of each load in flight."""
        self._first_loads: dict[str, list[str]] = {}

    def added(self, backend: str, facts: EngineFacts) -> None:
        seats = facts.seats or 0
        self.backends[backend] = BackendInFlight(facts, seats + int(seats * self._seat_slack))

    def lost(self, backend: str) -> None:
        place = self.backends[backend]
        for load in place.loads:
            del self._at[load]
        place.clear()
        place.down = True

    def load(self, effect: do.Load, stalled: Collection[str]) -> None:
        """Check a load: a version that has not answered loads once at a time, besides a load that a stall holds up."""
        backend, place, task = effect.backend, self.backends[effect.backend], effect.packed.task_id
        hold(not place.down, f"a Load goes to {backend}, which is down")
        hold(task not in place.loads.values(), f"{effect.digest} is loaded twice at once on {backend}")
        if task not in self._answered:
            elsewhere = [name for name, other in self.backends.items() if task in other.loads.values()]
            alone = not elsewhere or (len(elsewhere) == 1 and elsewhere[0] in stalled)
            hold(alone, f"{effect.digest} is on probation and loads twice")
            self._first_loads.setdefault(effect.digest, []).append(backend)
        place.loads[effect.load] = task
        place.pages[task] = effect.packed.pages
        self._at[effect.load] = backend
        place.check(backend)

    def first_loads_at(self, digest: str) -> list[str]:
        """Return the backends of a version's loads before its first answer, for which its requests wait everywhere."""
        return self._first_loads.get(digest, [])

    def load_ended(self, load: int, good: bool) -> None:
        backend = self._at.pop(load, None)
        if backend is None:
            return
        task = self.backends[backend].loads.pop(load)
        if good:
            self._answered[task] = None

    def dispatch(self, effect: do.Dispatch, kv_tokens: int) -> None:
        backend, place = effect.backend, self.backends[effect.backend]
        hold(not place.down, f"request {effect.request} goes to {backend}, which is down")
        hold(not place.draining, f"request {effect.request} goes to {backend}, which is draining")
        known = not effect.task_id or effect.task_id in place.pages
        hold(known, f"request {effect.request} goes to {backend}, where {effect.name} was never loaded")
        run = (effect.request, effect.attempt)
        place.runs[run] = effect.task_id
        place.kv_tokens[run] = kv_tokens
        place.check(backend)

    def run_ended(self, backend: str, request: int, attempt: int) -> None:
        place = self.backends[backend]
        place.runs.pop((request, attempt), None)
        place.kv_tokens.pop((request, attempt), None)


class Tier:
    """One tier of the store: checks that held and incoming entries stay within its bytes."""

    def __init__(self, name: str, budget_bytes: int) -> None:
        self.name = name
        self._budget_bytes = budget_bytes
        self._sizes: dict[str, int] = {}
        self._coming: dict[str, None] = {}

    def holds(self, key: str) -> bool:
        return key in self._sizes and key not in self._coming

    def coming(self, key: str, size_bytes: int) -> None:
        hold(key not in self._sizes, f"{self.name}: {key} comes twice")
        self._sizes[key] = size_bytes
        self._coming[key] = None
        total = sum(self._sizes.values())
        hold(total <= self._budget_bytes, f"{self.name}: {total} bytes and it may hold {self._budget_bytes}")

    def came(self, key: str) -> None:
        del self._coming[key]

    def failed(self, key: str) -> None:
        del self._coming[key], self._sizes[key]

    def dropped(self, key: str) -> None:
        hold(self.holds(key), f"{self.name}: {key} is dropped and is not there")
        del self._sizes[key]

    def size_bytes(self, key: str) -> int:
        return self._sizes[key]
