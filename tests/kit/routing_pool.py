"""A miniature pool of engines, to measure a routing policy's balance, loads and moves.

Each engine runs the requests that its slots and seats allow, oldest first; a request that does not fit is passed over
for at most `PATIENCE_S`. A step of b requests takes 11 ms + 0.13 ms x b, as with many 8B models. Clients are a closed
loop: when one of `in_flight` requests ends, the next one comes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from policies.views import Candidate, Waiting

SECOND = 1_000_000_000
PATIENCE_S = 10.0


@dataclass
class Engine:
    """One backend. Requests are [version, tokens left, seconds waited]."""

    id: str
    slots: int = 16
    seats: int = 256
    speed: float = 1.0
    up: bool = True
    queue: list[list[Any]] = field(default_factory=list)
    running: list[list[Any]] = field(default_factory=list)
    cached: OrderedDict[str, None] = field(default_factory=OrderedDict)
    loads: int = 0
    tokens: float = 0.0

    def candidate(self, version: str) -> Candidate:
        active = {request[0] for request in self.running}
        work = sum(request[1] for request in self.running) + sum(request[1] for request in self.queue)
        return Candidate(
            backend=self.id, resident=version in self.cached, open=version in active,
            awaited=version in active or any(request[0] == version for request in self.queue),
            held=len(self.cached), running=len(self.running), queued=len(self.queue), seats=self.seats,
            slots=self.slots, slots_free=self.slots - len(active), pages=1, work_tokens=int(work),
            tokens_per_s=3000.0 * self.speed,
        )  # fmt: skip

    def advance(self, dt_s: float) -> int:
        """Run for `dt_s` seconds; return the number of ended requests."""
        self._admit()
        for request in self.queue:
            request[2] += dt_s
        if not self.running:
            return 0
        tokens = self.speed * dt_s / (0.011 + 0.00013 * len(self.running))
        self.tokens += tokens * len(self.running)
        for request in self.running:
            request[1] -= tokens
        before = len(self.running)
        self.running = [request for request in self.running if request[1] > 0]
        return before - len(self.running)

    def _admit(self) -> None:
        active = Counter(request[0] for request in self.running)
        left = []
        for request in self.queue:
            version = request[0]
            overdue = bool(left) and left[0][2] > PATIENCE_S
            if not overdue and len(self.running) < self.seats and (version in active or len(active) < self.slots):
                self._load(version, active)
                active[version] += 1
                self.running.append(request)
            else:
                left.append(request)
        self.queue = left

    def _load(self, version: str, active: Counter[str]) -> None:
        if version not in self.cached:
            self.loads += 1
            if len(self.cached) >= self.slots:
                del self.cached[next(one for one in self.cached if one not in active)]
        self.cached[version] = None
        self.cached.move_to_end(version)


class Offered:
    """The candidates of one request (`policies.views.Candidates`); counts how many were read."""

    def __init__(self, pool: Pool, version: str) -> None:
        self.pool, self.version, self.looked = pool, version, 0
        self.backends = tuple(engine.id for engine in pool.engines.values() if engine.up)
        self.in_flight = sum(len(engine.queue) + len(engine.running) for engine in pool.engines.values())
        self.rank = 8

    def __getitem__(self, backend: str) -> Candidate:
        self.looked += 1
        return self.pool.engines[backend].candidate(self.version)

    def in_flights(self) -> list[int]:
        return [len(one.running) + len(one.queue) for one in self._up()]

    def residents(self) -> list[str]:
        return [one.id for one in self._up() if one.candidate(self.version).resident]

    def _up(self) -> list[Engine]:
        return [self.pool.engines[backend] for backend in self.backends]

    def __iter__(self) -> Iterator[Candidate]:
        return (self[backend] for backend in self.backends)

    def __len__(self) -> int:
        return len(self.backends)


@dataclass
class Pool:
    """Engines, a policy and a closed loop of clients. `draw` gives the version of the n-th request."""

    policy: Any
    draw: Callable[[int], str]
    engines: dict[str, Engine]
    output_tokens: int = 256
    now_ns: int = 0
    count: int = 0
    looked: list[int] = field(default_factory=list)

    def run(self, seconds: float, in_flight: int, dt_s: float = 0.1) -> Figures:
        """Run for `seconds` and return the figures of that time."""
        before = self._figures()
        for _ in range(round(seconds / dt_s)):
            outstanding = sum(len(engine.queue) + len(engine.running) for engine in self.engines.values())
            for _ in range(in_flight - outstanding):
                self.arrive()
            self.now_ns += round(dt_s * SECOND)
            for engine in self.engines.values():
                if engine.up:
                    engine.advance(dt_s)
        after = self._figures()
        return Figures(
            (after.tokens - before.tokens) / seconds, after.loads - before.loads, after.requests - before.requests,
            after.moves - before.moves,
        )  # fmt: skip

    def arrive(self) -> str:
        version = self.draw(self.count)
        self._route([version, float(self.output_tokens), 0.0])
        self.count += 1
        return version

    def _route(self, request: list[Any]) -> None:
        waiting = Waiting(self.count + 1, request[0], request[0], "t", "default", self.now_ns, 256, self.output_tokens)
        offered = Offered(self, request[0])
        choice = self.policy.pick(waiting, offered, self.now_ns)
        self.looked.append(offered.looked)
        self.engines[choice.backend].queue.append(request)

    def lose(self, backend: str) -> None:
        """Remove an engine; its requests are routed again."""
        engine = self.engines[backend]
        engine.up = False
        stranded = [*engine.running, *engine.queue]
        engine.running, engine.queue = [], []
        engine.cached.clear()
        for request in stranded:
            self._route(request)

    def _figures(self) -> Figures:
        engines = self.engines.values()
        moves = getattr(self.policy, "moves", 0)
        return Figures(sum(one.tokens for one in engines), sum(one.loads for one in engines), self.count, moves)


@dataclass
class Figures:
    """Tokens per second (in a snapshot: tokens), and counts."""

    tokens: float
    loads: int
    requests: int
    moves: int

    @property
    def loads_per_request(self) -> float:
        return self.loads / self.requests


def engines(count: int = 4, **settings: Any) -> dict[str, Engine]:
    return {f"b{number}": Engine(f"b{number}", **settings) for number in range(count)}
