"""What is done to a pool under load. Each leaves it whole again, and says when what began to be away."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic

import grpc
import grpc.aio

from sidecar.errors import CRASHED_EXIT
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.chaos.load import BROKEN, CUT
from tests.chaos.pool import LEASE_S, POISON, ChaosPool, ReplicaProcess
from tests.kit.redis_servers import Server, Watched
from tests.kit.serving import PATIENCE_S

LONG_S = 3 * LEASE_S
"""Longer than a lease, and than any of the terms that follow from it."""


@dataclass
class Marks:
    """When something was taken away, and the backends whose engines were.

    What such a backend served others serve, and when it is given something again is for the routing policy to say.
    """

    taken_s: list[float] = field(default_factory=list)
    down: set[str] = field(default_factory=set)

    def set(self) -> None:
        """Note that something was taken away, or given back in another state, right now."""
        self.taken_s.append(monotonic())

    def since_s(self, backend: str) -> list[float]:
        """Return the times from which on a backend ought to serve again."""
        return [] if backend in self.down else self.taken_s


Deed = Callable[[ChaosPool, Marks], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """`allowed` are the endings, beside full and refused, that its clients may see."""

    name: str
    deed: Deed
    allowed: frozenset[str] = frozenset()
    stops: bool = False
    """Whether a process stands still, so that it may write past the end of its lease."""
    sentinel: bool = False
    redis_away_s: float = 0.0
    """For how long what is lost besides cannot change hands."""
    refuses: bool = False
    """Whether there is a time in which nobody takes requests."""
    cuts_lane: bool = False
    """Whether Envoy's connections to an engine break: it cuts what is answered, and can't answer what is not yet."""

    @property
    def allowed_in_lane(self) -> frozenset[str]:
        return self.allowed | LOST if self.cuts_lane else self.allowed


async def kill_replica(pool: ChaosPool, marks: Marks) -> None:
    owner = await pool.owner()
    marks.set()
    await owner.kill()
    await asyncio.sleep(LONG_S)
    await owner.start()
    await pool.until_settled(pool.replicas)


async def poison(pool: ChaosPool, marks: Marks) -> None:
    """Send a request that ends whatever core takes it in to a replica that passes it on."""
    owner = await pool.owner()
    asked = next(replica for replica in pool.replicas if replica is not owner)
    told = await _asked_for_poison(asked)
    marks.set()
    assert told.code() is grpc.StatusCode.INTERNAL, f"{asked.name} told its client {told.code()}: {told.details()}"
    exits = await _exits(pool)
    assert len(exits) <= 2, f"one request ended {exits}"
    assert set(exits.values()) == {CRASHED_EXIT}, exits
    for name in exits:
        await pool.named(name).start()
    await pool.until_settled(pool.replicas)


async def _asked_for_poison(replica: ReplicaProcess) -> grpc.aio.AioRpcError:
    request = gateway_pb2.GenerateRequest(adapter=POISON, tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=4)
    async with grpc.aio.insecure_channel(replica.data) as channel:
        try:
            await anext(aiter(gateway_pb2_grpc.GatewayStub(channel).Generate(request, timeout=PATIENCE_S)))
        except grpc.aio.AioRpcError as error:
            return error
    raise AssertionError(f"{replica.name} answered what its core raises on")


async def _exits(pool: ChaosPool) -> dict[str, int]:
    """Return the exit codes of the replicas that have ended, after as long as a second one may take to."""
    await asyncio.sleep(LONG_S)
    ended = [replica for replica in pool.replicas if not replica.runs]
    return {replica.name: await replica.ended() for replica in ended}


async def stop_owner(pool: ChaosPool, marks: Marks) -> None:
    owner = await pool.owner()
    marks.set()
    owner.signal(signal.SIGSTOP)
    await asyncio.sleep(LONG_S)
    owner.signal(signal.SIGCONT)
    await pool.until_settled(pool.replicas)


async def kill_redis(pool: ChaosPool, marks: Marks) -> None:
    assert isinstance(pool.redis, Server)
    marks.set()
    await pool.redis.kill()
    await asyncio.sleep(LONG_S)
    await pool.redis.start()
    marks.set()
    await asyncio.sleep(LONG_S)
    await pool.until_settled(pool.replicas)


async def stop_redis(pool: ChaosPool, marks: Marks) -> None:
    """Its connections stay open and nothing answers."""
    assert isinstance(pool.redis, Server)
    marks.set()
    pool.redis.signal(signal.SIGSTOP)
    await asyncio.sleep(LONG_S)
    pool.redis.signal(signal.SIGCONT)
    marks.set()
    await pool.until_settled(pool.replicas)


async def fail_over(pool: ChaosPool, marks: Marks) -> None:
    assert isinstance(pool.redis, Watched)
    marks.set()
    await pool.redis.master.kill()
    await asyncio.sleep(2 * LONG_S)
    await pool.until_settled(pool.replicas)


async def part_from_redis(pool: ChaosPool, marks: Marks) -> None:
    owner = await pool.owner()
    assert owner.redis is not None
    marks.set()
    await owner.redis.cut()
    await asyncio.sleep(LONG_S)
    await owner.redis.mend()
    marks.set()
    await pool.until_settled(pool.replicas)


async def part_replicas(pool: ChaosPool, marks: Marks) -> None:
    owner = await pool.owner()
    marks.set()
    await owner.peers.cut()
    await asyncio.sleep(LONG_S)
    await owner.peers.mend()
    marks.set()
    await pool.until_settled(pool.replicas)


async def kill_engine(pool: ChaosPool, marks: Marks) -> None:
    marks.down.add(pool.backends[0])
    marks.set()
    await pool.engines[0].kill()
    await asyncio.sleep(LONG_S)
    await pool.engines[0].start()
    await asyncio.sleep(LONG_S)


async def restart_all(pool: ChaosPool, marks: Marks) -> None:
    for replica in pool.replicas:
        marks.set()
        replica.signal(signal.SIGTERM)
        code = await replica.ended()
        assert code == 0, f"{replica.name} ended with {code}"
        await replica.start()
        await pool.until_settled(pool.replicas)


async def restart_two(pool: ChaosPool, marks: Marks) -> None:
    """Both at once: what one gives back must not wait for the other."""
    owner = await pool.owner()
    other = next(replica for replica in pool.replicas if replica is not owner)
    marks.set()
    for replica in (owner, other):
        replica.signal(signal.SIGTERM)
    for replica in (owner, other):
        code = await replica.ended()
        assert code == 0, f"{replica.name} ended with {code}"
    await asyncio.gather(owner.start(), other.start())
    await pool.until_settled(pool.replicas)


async def restart_whole_pool(pool: ChaosPool, marks: Marks) -> None:
    """All at once: what has begun is answered in full, the rest refused, and nobody waits for the others."""
    for replica in pool.replicas:
        replica.signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        codes = [await replica.ended() for replica in pool.replicas]
    assert codes == [0] * len(codes), f"the replicas ended with {codes}"
    await asyncio.gather(*(replica.start() for replica in pool.replicas))
    marks.set()
    await pool.until_settled(pool.replicas)


def both(one: Deed, other: Deed) -> Deed:
    async def deed(pool: ChaosPool, marks: Marks) -> None:
        await asyncio.gather(one(pool, marks), other(pool, marks))

    return deed


async def kill_another(pool: ChaosPool, marks: Marks) -> None:
    """Kill a replica that does not own the first backend, so that it goes with deeds upon its owner."""
    owner = await pool.owner()
    other: ReplicaProcess = next(replica for replica in pool.replicas if replica is not owner)
    marks.set()
    await other.kill()
    await asyncio.sleep(LONG_S)
    await other.start()
    await pool.until_settled(pool.replicas)


LOST = frozenset({BROKEN, CUT})
"""An answer that had begun ends with the process that gave it, and a client's call with the process that it was to."""

SCENARIOS = (
    Scenario("kill-replica", kill_replica, LOST),
    Scenario("poison", poison, frozenset({BROKEN})),
    Scenario("stop-owner", stop_owner, frozenset({BROKEN}), stops=True),
    Scenario("kill-redis", kill_redis),
    Scenario("stop-redis", stop_redis),
    Scenario("fail-over", fail_over, sentinel=True),
    Scenario("part-from-redis", part_from_redis),
    Scenario("part-replicas", part_replicas, frozenset({BROKEN})),
    Scenario("kill-engine", kill_engine, frozenset({BROKEN}), cuts_lane=True),
    Scenario("restart-all", restart_all),
    Scenario("restart-two", restart_two),
    Scenario("restart-whole-pool", restart_whole_pool, refuses=True),
    Scenario("kill-redis+kill-engine", both(kill_redis, kill_engine), frozenset({BROKEN}), cuts_lane=True),
    Scenario("kill-redis+kill-another", both(kill_redis, kill_another), LOST, redis_away_s=LONG_S),
    Scenario("kill-redis+part-replicas", both(kill_redis, part_replicas), frozenset({BROKEN})),
    Scenario("fail-over+kill-replica", both(fail_over, kill_replica), LOST, sentinel=True, redis_away_s=2.0),
    Scenario("part-from-redis+kill-another", both(part_from_redis, kill_another), LOST),
    Scenario("stop-owner+kill-engine", both(stop_owner, kill_engine), frozenset({BROKEN}), stops=True, cuts_lane=True),
    Scenario("part-replicas+part-from-redis", both(part_replicas, part_from_redis), frozenset({BROKEN})),
)
