"""A world of members, Redis and a network, and its faults."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.facts import SECOND_NS, Member
from tests.worlds.ownership.checks import Checks
from tests.worlds.ownership.network import Network
from tests.worlds.ownership.process import Process
from tests.worlds.ownership.redis import Data, Redis
from tests.worlds.ownership.scenario import Scenario

HISTORY = 150
STOPPED_SHARE = 0.001
"""The share of writes before which their process is stopped, after the check."""
EPOCH_NS = 1_700_000_000 * SECOND_NS


class RedisProcess:
    """One life of Redis, on a host with its own clock."""

    def __init__(self, world: World, process: str, data: Data, skew_ns: int) -> None:
        self.scripts = Redis(world.scenario.bounds, process, data)
        self.up = True
        self._net = world.net
        self._clock = world.net.clock(EPOCH_NS + world.net.now_ns + skew_ns)

    @property
    def now_ns(self) -> int:
        return self._clock.at(self._net.now_ns)


class World:
    """One world. `trace` keeps the last steps, for the report of a failure."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = Random(f"misfortune {scenario.seed}")
        self.net = Network(scenario, self.random)
        self.counts: Counter[str] = Counter()
        self.history: deque[tuple[int, str, object, object]] = deque(maxlen=HISTORY)
        self.processes: dict[str, Process] = {}
        self.copies: deque[Data] = deque(maxlen=10)
        self.checks = Checks(self)
        self._lives = 0
        data = Data() if scenario.is_new else Data("redis-0")
        self.redis = RedisProcess(self, "redis-0", data, 0)
        for name in scenario.members:
            self.start(name)
        self._misfortunes = [act for kind, act in MISFORTUNES.items() if scenario.has(kind)]
        self.net.after(0, self._befall)
        self.net.after(0, self._copy)

    def living(self) -> list[Process]:
        return [each for each in self.processes.values() if each.alive]

    def trace(self, process: Process, event: ev.Event, effects: list[do.Effect]) -> None:
        self.history.append((self.net.now_ns, process.member.id, event, effects))

    def note(self, text: str) -> None:
        self.counts[text.split(":")[0]] += 1
        self.history.append((self.net.now_ns, "", text, ""))

    def start(self, name: str) -> None:
        self._lives += 1
        weight = 1 + (len(name) + int(name.rsplit("-", 1)[1])) % 3
        process = Process(self, Member(f"{name}#{self._lives}", name, weight))
        self.processes[process.member.id] = process

    def heal(self) -> None:
        """End all faults. Dead members stay dead, but at least one lives."""
        self.net.is_faulty = False
        self.net.cuts.clear()
        if not self.redis.up:
            self.start_redis(self.redis.scripts.data, 0)
        for each in self.living():
            if each.paused:
                each.resume()
            for backend in sorted(each.unseen):
                each.sees(backend, True)
        if not [each for each in self.living() if not each.draining]:
            self.start(self._fresh_name())

    def _fresh_name(self) -> str:
        return f"replica-{10 + self._lives}"

    def _befall(self) -> None:
        if not self.net.is_faulty:
            return
        self.net.after(self.random.randint(1, 2 * self.scenario.every_ns), self._befall)
        if self._misfortunes:
            self.random.choice(self._misfortunes)(self)

    def _copy(self) -> None:
        """Update the data that a replica of Redis has received so far."""
        if self.net.is_faulty:
            self.net.after(self.random.randint(1, SECOND_NS), self._copy)
            self.copies.append(self.redis.scripts.data.copy())

    def _span_ns(self) -> int:
        """Return a duration: shorter than a lease, longer, or as long as an owner may go on without Redis."""
        bounds = self.scenario.bounds
        return self.random.randint(1, self.random.choice((bounds.ttl_ns, 2 * bounds.ttl_ns, 2 * bounds.alone_ns)))

    def _any(self) -> Process | None:
        living = self.living()
        return self.random.choice(living) if living else None

    def pause(self, process: Process | None = None) -> None:
        """Stop a process, as SIGSTOP does, and resume it later."""
        process = process or self._any()
        if process is not None and not process.paused:
            process.paused = True
            self.note(f"paused: {process.member.id}")
            self.net.after(self._span_ns(), lambda: process.resume() if process.paused else None)

    def checked(self, process: Process) -> None:
        """Sometimes stop a process between a check and its write."""
        if self.net.is_faulty and self.scenario.has("pauses") and self.random.random() < STOPPED_SHARE:
            self.pause(process)

    def kill(self) -> None:
        process = self._any()
        if process is None or len(self.living()) == 1:
            return
        process.alive = False
        self.note(f"killed: {process.member.id}")
        name = process.member.name if self.random.random() < 0.6 else self._fresh_name()
        if self.random.random() < 0.9:
            self.net.after(self._span_ns(), lambda: self._restart(name))

    def _restart(self, name: str) -> None:
        if name not in [each.member.name for each in self.living()]:
            self.note(f"started: {name}")
            self.start(name)

    def join(self) -> None:
        if len(self.living()) < 7:
            self._restart(self._fresh_name())

    def drain(self) -> None:
        process = self._any()
        if process is not None and sum(not each.draining for each in self.living()) > 2:
            process.draining = True
            self.note(f"drains: {process.member.id}")
            process.give(ev.DrainBegun())

    def lose_sight(self) -> None:
        """Make a member consider a backend gone, and find it again later."""
        process, backend = self._any(), self.random.choice(sorted(self.scenario.backends))
        if process is not None and backend not in process.unseen:
            self.note(f"lost sight: {process.member.id} of {backend}")
            process.sees(backend, False)
            self.net.after(self._span_ns(), lambda: process.sees(backend, True))

    def redis_down(self) -> None:
        if self.redis.up:
            self.redis.up = False
            self.note("redis down")
            self.net.after(self._span_ns(), lambda: self.start_redis(self.redis.scripts.data, 0))

    def redis_emptied(self) -> None:
        if not self.redis.up:
            return
        self.note("redis emptied")
        if self.random.random() < 0.3:
            self.redis.scripts.data = Data()
        else:
            self.redis.up = False
            self.net.after(self._span_ns(), lambda: self.start_redis(Data(), 0))

    def redis_failed_over(self) -> None:
        if self.redis.up and self.copies:
            self.note("redis failed over")
            self.redis.up = False
            data = self.random.choice(self.copies).copy()
            most_ns = self.scenario.bounds.grace_ns * 2 // 5  # two hosts' clocks differ by less than `grace_ns`
            skew_ns = self.random.randint(-most_ns, most_ns)
            self.net.after(self._span_ns() // 2, lambda: self.start_redis(data, skew_ns))

    def start_redis(self, data: Data, skew_ns: int) -> None:
        if not self.redis.up:
            self.counts["redis started"] += 1
            self.redis = RedisProcess(self, f"redis-{self.counts['redis started']}", data, skew_ns)
            self.history.append((self.net.now_ns, "", f"{self.redis.scripts.process} starts", ""))

    def cut_redis(self) -> None:
        """Cut some members off from Redis, in one or both directions; often an owner, for longer than its lease."""
        owners = [each for each in self.living() if any(each.owns(backend) for backend in self.scenario.backends)]
        if not owners or self.random.random() < 0.3:
            self._cut([(each, "redis") for each in self._some()])
            return
        owner = self.random.choice(owners).member.id
        others = [each.member.id for each in self.living() if each.member.id != owner]
        some = self.random.sample(others, self.random.randint(0, max(0, len(others) - 1)))
        ttl_ns = self.scenario.bounds.ttl_ns
        self._cut([(each, "redis") for each in (owner, *some)], ttl_ns, 3 * ttl_ns)

    def cut_members(self) -> None:
        """Cut some members off from the others, in one or both directions."""
        some = self._some()
        others = [each.member.id for each in self.living() if each.member.id not in some]
        self._cut([(one, other) for one in some for other in others])

    def cut_island(self) -> None:
        """Isolate some members, or all, from Redis and the others, which a newcomer may join."""
        island = [each.member.id for each in self.living()] if self.random.random() < 0.5 else self._some()
        if self.random.random() < 0.7:
            self.join()
        others = [each.member.id for each in self.living() if each.member.id not in island]
        self._cut(
            [(one, other) for one in island for other in [*others, "redis"]], 1, 2 * self.scenario.bounds.alone_ns
        )

    def _some(self) -> list[str]:
        """Return one member, all, or some of them."""
        living = [each.member.id for each in self.living()]
        self.random.shuffle(living)
        return living[: self.random.choice((1, len(living), self.random.randint(0, len(living))))]

    def _cut(self, pairs: list[tuple[str, str]], least_ns: int = 0, most_ns: int = 0) -> None:
        span_ns = self.random.randint(least_ns, most_ns) if most_ns else self._span_ns()
        kind = self.random.random()
        ways = [(one, other) for one, other in pairs if kind < 0.85]
        ways += [(other, one) for one, other in pairs if kind > 0.15]
        self.note(f"cut: {ways}")
        for way in ways:
            self.net.cuts[way] = max(self.net.now_ns + span_ns, self.net.cuts.get(way, 0))


MISFORTUNES: dict[str, Callable[[World], None]] = {
    "pauses": World.pause,
    "kills": World.kill,
    "redis down": World.redis_down,
    "redis emptied": World.redis_emptied,
    "redis failed over": World.redis_failed_over,
    "members cut from redis": World.cut_redis,
    "members cut from each other": World.cut_members,
    "islands": World.cut_island,
    "joins": World.join,
    "drains": World.drain,
    "sightings": World.lose_sight,
}
