"""Budgets that three replicas share through a real Redis: what they grant together, with Redis and without it.

Time is virtual, but for Redis' own. A replica that is killed is one that is not heard of again: it writes nothing down.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from time import time

import pytest

from sidecar.access.budgets.budgets import Budgets
from sidecar.access.budgets.kept import Kept
from sidecar.access.budgets.leases import LEASE, Leases
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused
from sidecar.state.redis.link import Link
from sidecar.state.redis.scripts import Script
from sidecar.tasks import ended
from tests.kit.redis_servers import PATIENCE_S, Server, cluster, running
from tests.kit.registries import link_to
from tests.kit.tenant_load import WHO, Pool, Time, killed

LIMIT = 200_000
BOTH = Limit(tenant="*", tokens_per_minute=LIMIT)
INPUT = Limit(tenant="*", tokens="input", tokens_per_minute=LIMIT)
"""What a request takes of it is known when it comes: then nothing may be granted above the limit."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


@pytest.fixture
async def links(server: Server) -> AsyncIterator[list[Link]]:
    links = [link_to(server.url) for _ in range(3)]
    yield links
    for link in links:
        await link.close()


def say(what: str, pool: Pool, windows: int) -> None:
    """Print the figures that a test has measured."""
    parts = [f"{pool.granted(60 * window, 60 * window + 60) / pool.limit:.4f}" for window in range(windows)]
    total = pool.granted(0, 60 * windows) / pool.limit / windows
    print(f"{what}: granted {total:.4f} of the limit, by minute {' '.join(parts)}")


@pytest.mark.parametrize("weights", [(1, 1, 1), (8, 1, 1), (1, 0, 0)], ids=["evenly", "unevenly", "to one"])
async def test_four_times_the_limit_for_two_minutes(weights: tuple[float, ...], links: list[Link]) -> None:
    """The answers' lengths are not known before; a block is a second of a replica's use."""
    pool = Pool(BOTH, links, 4, weights)
    await pool.run(120)
    say(f"answers of unknown length, load {weights}", pool, 2)
    blocks = 4 * LIMIT / 60
    assert abs(pool.granted() - 2 * LIMIT) <= 0.02 * 2 * LIMIT + blocks
    assert sum((replica.refused for replica in pool.all), start=type(pool.all[0].refused)()).keys() == {
        Reason.RATE_LIMITED
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
async def test_over_eight_minutes_debts_make_up_for_what_was_too_much(seed: int, links: list[Link]) -> None:
    pool = Pool(BOTH, links, 4, seed=seed)
    await pool.run(480)
    say("eight minutes", pool, 8)
    assert pool.granted() == pytest.approx(8 * LIMIT, rel=0.01)


@pytest.mark.parametrize("weights", [(1, 1, 1), (8, 1, 1)], ids=["evenly", "unevenly"])
async def test_what_is_known_is_never_granted_above_the_limit(weights: tuple[float, ...], links: list[Link]) -> None:
    pool = Pool(INPUT, links, 4, weights)
    await pool.run(120)
    say(f"prompts only, load {weights}", pool, 2)
    for window in range(2):
        assert 0.98 * LIMIT <= pool.granted(60 * window, 60 * window + 60) <= LIMIT


@pytest.mark.parametrize("killed_s", [5, 60, 65], ids=["with much left", "between windows", "in the second"])
async def test_without_redis_no_more_than_the_shares(killed_s: float, server: Server, links: list[Link]) -> None:
    """Each replica goes on with its share, less what it has taken; the shares' sum is the limit."""
    pool = Pool(INPUT, links)
    await pool.run(killed_s)
    await server.kill()
    await pool.run(180)
    say(f"Redis killed at {killed_s} s", pool, 3)
    assert all(replica.leases.is_away for replica in pool.all)
    for window in range(3):
        assert 0.95 * LIMIT <= pool.granted(60 * window, 60 * window + 60) <= LIMIT
        for replica in pool.all:
            if 60 * window >= killed_s:
                assert pool.granted(60 * window, 60 * window + 60, [replica]) <= LIMIT / 3


async def test_redis_comes_back_without_its_data(server: Server, links: list[Link]) -> None:
    """Replicas say again what they have spent, those too that have no requests now."""
    pool = Pool(INPUT, links, weights=(1, 1, 1))
    await pool.run(5)
    await server.kill()
    await pool.run(8)
    pool.weights = (1, 0, 0)
    await server.start()
    await pool.run(120)
    say("Redis restarted empty", pool, 2)
    assert not any(replica.leases.is_away for replica in pool.all)
    for window in range(2):
        assert 0.98 * LIMIT <= pool.granted(60 * window, 60 * window + 60) <= LIMIT


async def test_a_killed_replica_forgets_a_second_at_most_and_in_nobodys_favour(links: list[Link]) -> None:
    """What it had leased counts as taken until the window turns."""
    pool = Pool(INPUT, links)
    await pool.run(7)
    victim = pool.all[1]
    forgotten = victim.meter.lease.held - victim.meter.taken
    last_second = pool.granted(6, 7, [victim])
    print(f"a killed replica forgot {forgotten:,} tokens; it had granted {last_second:,} in its last second")
    assert 0 <= forgotten <= 1.1 * last_second
    pool.alive.remove(victim)
    await pool.run(120)
    say("one of three replicas killed at 7 s", pool, 2)
    assert 0.98 * LIMIT - forgotten <= pool.granted(0, 60) <= LIMIT - forgotten
    assert 0.98 * LIMIT <= pool.granted(60, 120) <= LIMIT


async def test_what_a_replica_does_not_use_goes_to_the_others(links: list[Link]) -> None:
    pool = Pool(INPUT, links, times=2, weights=(1, 0, 0))
    await pool.run(15)
    pool.weights = (0, 1, 0)
    await pool.run(60)
    say("load that moves from one replica to another", pool, 1)
    assert 0.99 * LIMIT <= pool.granted() <= LIMIT


async def test_a_replica_that_has_old_news_pays_in_the_next_window(links: list[Link]) -> None:
    """It believes what it last heard until Redis answers, so a burst is not refused. That is a debt, not a gift."""
    pool = Pool(INPUT, links, weights=(1, 0, 0))
    idle = pool.all[1]
    idle.budgets.reserve(*WHO, 100, 0).settle(None, 0, ran=True)
    await pool.run(30)
    assert pool.granted() + 100 == pytest.approx(LIMIT, abs=400)
    granted = 100
    with suppress(Refused):
        while True:
            idle.budgets.reserve(*WHO, 100, 0).settle(None, 0, ran=True)
            granted += 100
    assert granted <= LIMIT / 3
    await pool.run(120)
    total = pool.granted() + granted
    print(f"a burst on old news: {granted / LIMIT:.4f} too much, over two minutes {total / LIMIT / 2:.4f}")
    assert 0.98 * 2 * LIMIT <= total <= 2 * LIMIT + 100


async def test_a_limit_that_is_changed_counts_at_all_replicas(links: list[Link]) -> None:
    pool = Pool(INPUT, links)
    await pool.run(10)
    for replica in pool.all:
        replica.budgets.set_limits([Limit(tenant="*", tokens="input", tokens_per_minute=LIMIT // 2)])
    before = pool.granted()
    await pool.run(60)
    assert pool.granted() == before > LIMIT / 2
    await pool.run(120)
    assert 0.98 * LIMIT / 2 <= pool.granted(60, 120) <= LIMIT / 2, "what was within the former limit is no debt"


async def test_requests_at_once_are_divided_among_replicas(links: list[Link]) -> None:
    leases = Leases(links[0], "a", lambda: 3, time)
    budgets = Budgets([Limit(concurrent=7), Limit(tenant="acme", concurrent=2)], time, leases)
    budgets.reserve("zeta", "", "", 1, 1)
    budgets.reserve(*WHO, 1, 1)
    with pytest.raises(Refused, match=r"may have 7 requests at once, 2 at each of 3 replicas, and has 2;"):
        budgets.reserve("zeta", "", "", 1, 1)


async def test_a_replica_that_starts_while_redis_is_away_has_its_share(
    server: Server, links: list[Link], tmp_path: Path
) -> None:
    """Its data directory says how many there were. Without one it knows of no other."""
    clock, kept = Time(), tmp_path / "replicas"
    limit = Limit(tokens="input", tokens_per_minute=900)
    members = 1
    leases = Leases(links[0], "a", lambda: members, clock, kept)
    budgets = Budgets([limit], clock, leases)
    budgets.reserve(*WHO, 10, 0)
    await leases.ask()
    members = 3
    await leases.ask()
    assert leases.replicas == 3
    await server.kill()
    for file, share in ((kept, 300), (tmp_path / "none", 900)):
        alone = Leases(links[1], "b", lambda: 1, clock, file)
        budgets = Budgets([limit], clock, alone)
        budgets.reserve(*WHO, 100, 0)
        await alone.ask()
        assert alone.is_away
        with suppress(Refused):
            while True:
                budgets.reserve(*WHO, 100, 0)
        assert budgets.taken(limit) == {"tokens_per_minute": share}


async def test_all_replicas_are_killed_and_others_start(server: Server, links: list[Link]) -> None:
    """They have no data directory. Before its first request each asks Redis what is taken of every budget."""
    pool = Pool(INPUT, links)
    await pool.run(30)
    assert pool.granted() >= 0.98 * LIMIT
    for number, link in enumerate(links):
        leases = Leases(link, f"new-{number}", lambda: 3, pool.clock)
        await leases.learn()
        budgets = Budgets([INPUT], pool.clock, leases)
        with pytest.raises(Refused, match=r"used so far: "):
            budgets.reserve(*WHO, 400, 0)
        budgets.reserve("zeta", *WHO[1:], 400, 0)
    await server.kill()
    await leases.learn()
    assert leases.is_away


async def test_a_restart_without_redis_goes_on_with_what_was_left(
    server: Server, links: list[Link], tmp_path: Path
) -> None:
    """However often it is killed while Redis is away, a replica gets its share once."""
    clock, limit, granted = Time(), Limit(tokens="input", tokens_per_minute=900), 0
    await server.kill()
    for life in range(3):
        leases = Leases(links[0], f"a-{life}", lambda: 3, clock)
        kept = Kept(leases, tmp_path / "budgets.sqlite", clock)
        await kept.start()
        await leases.learn()
        budgets = Budgets([limit], clock, kept)
        with suppress(Refused):
            while True:
                budgets.reserve(*WHO, 100, 0)
                granted += 100
        await kept.save()
        await killed(kept)
    assert granted == 300


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("word", "seconds"), [("minute", 60), ("day", 86_400)])
async def test_a_clock_that_jumps_locks_nobody_out(
    word: str, seconds: int, seed: int, links: list[Link], tmp_path: Path
) -> None:
    """Two replicas whose clock jumps ahead and back, and which restart: who was refused is let in after the time that
    was told, and the window after the last return is whole.
    """
    rng, clock = random.Random(seed), Time()
    limit = Limit.model_validate({"tenant": "*", "tokens": "input", f"tokens_per_{word}": 1000})

    async def begin(number: int) -> tuple[Kept, Leases, Budgets]:
        leases = Leases(links[number], f"{number}-{rng.random()}", lambda: 2, clock)
        kept = Kept(leases, tmp_path / f"budgets-{number}.sqlite", clock)
        await kept.start()
        await leases.learn()
        return kept, leases, Budgets([limit], clock, kept)

    replicas = [await begin(0), await begin(1)]

    async def move(by_s: float) -> None:
        """Move the clock; each replica hears what the others hold, so that it grants nothing by old news."""
        clock.now_s += by_s
        for _, leases, budgets in (*replicas, *replicas):
            budgets.look(limit, WHO[0])
            await leases.ask()

    async def ask(number: int, tokens: int) -> bool:
        wait_s = 0.0
        try:
            replicas[number][2].reserve(*WHO, tokens, 0).settle(None, 0, ran=True)
        except Refused as refused:
            wait_s = refused.retry_after_s or math.inf
        await move(0)
        assert wait_s <= seconds
        return not wait_s

    async def use_up() -> int:
        """Take all that is left, each replica in turn. Return how much it was."""
        taken = 0
        for number in (0, 1, 0, 1):
            while await ask(number, 100):
                taken += 100
        return taken

    for _ in range(25):
        match rng.choice(("ask", "ask", "use", "jump", "wait", "restart")):
            case "ask":
                await ask(rng.randrange(2), rng.randint(1, 300))
            case "use":
                await use_up()
            case "wait":
                await move(rng.choice((1.0, seconds / 3)))
            case "jump":
                ahead_s = rng.choice((1, seconds, 3 * seconds))
                await move(ahead_s)
                await use_up()
                await move(-ahead_s)
            case "restart":
                number = rng.randrange(2)
                await replicas[number][0].save(ahead=False)
                await killed(replicas[number][0])
                replicas[number] = await begin(number)
    await use_up()
    await move(replicas[0][2].standing(*WHO).tokens.resets_s)  # type: ignore[union-attr]
    assert 900 <= await use_up() <= 1000
    for kept, _, _ in replicas:
        await kept.close()


def _script(*budgets: str) -> Script:
    return Script(("budgets", *budgets), LEASE.text)


async def test_a_repeated_question_changes_nothing(links: list[Link]) -> None:
    """The client sends one again that got no answer. A budget's values: limit, spent, wanted, seconds to keep it."""
    link = links[0]

    async def ask(member: str, *values: int) -> list[int]:
        _, *answer = await link.run(_script("b"), member, "mark", *values)
        return list(answer)

    assert await ask("of:a", 100, 0, 60, 60) == [60, 60]
    assert await ask("of:a", 100, 0, 60, 60) == [60, 60]
    assert await ask("of:b", 100, 0, 60, 60) == [40, 100]
    assert await ask("of:b", 100, 0, 60, 60) == [40, 100]
    assert await ask("of:a", 100, 10, 20, 60) == [20, 60], "given back"
    assert await ask("of:b", 100, 0, 60, 60) == [60, 80]
    assert await ask("of:c", 100, 90, 95, 60) == [90, 170], "what is spent is a claim, and nothing is added to it"
    assert await ask("of:b", 50, 0, 80, 60) == [60, 170], "what is leased stays when the limit is lowered"
    async with asyncio.timeout(PATIENCE_S):
        assert 0 < await link._client.ttl(link.key("b")) <= 60


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


async def test_in_the_background(server: Server, links: list[Link]) -> None:
    """A request is answered before Redis is asked; a Redis that ends or hangs is noticed, and when it is back."""
    leases = Leases(links[0], "a", lambda: 2, time)
    budgets = Budgets([Limit(tenant="*", tokens_per_day=100_000)], time, leases)
    running_ = asyncio.create_task(leases.run())
    try:
        budgets.reserve(*WHO, 500, 0).settle(None, 0, ran=True)
        [budget] = budgets._budgets.values()
        meter = budget.meters["tokens_per_day"]
        assert meter.lease.total is None
        await _until(lambda: meter.lease.held >= 500)
        async with server.client() as client:
            keys = [key async for key in client.scan_iter("*:budget:*")]
            assert int((await client.hgetall(keys[0]))["total"]) >= 500
        await server.kill()
        budgets.reserve(*WHO, 500, 0).settle(None, 0, ran=True)
        await _until(lambda: leases.is_away)
        await server.start()
        await _until(lambda: not leases.is_away and meter.lease.held >= 1000)
        server.signal(signal.SIGSTOP)
        budgets.reserve(*WHO, 500, 0).settle(None, 0, ran=True)
        await _until(lambda: leases.is_away)
        server.signal(signal.SIGCONT)
        await _until(lambda: not leases.is_away and meter.lease.held >= 1500)
    finally:
        await ended(running_)


async def _shares(url: str) -> None:
    """Have two replicas share a budget through a Redis at this address."""
    links = [link_to(url) for _ in range(2)]
    try:
        pool = Pool(INPUT, links, weights=(2, 1))
        await pool.run(20)
        assert 0.98 * LIMIT <= pool.granted() <= LIMIT
        assert {replica.meter.lease.total for replica in pool.all} == {LIMIT}
    finally:
        for link in links:
            await link.close()


async def test_in_valkey(tmp_path: Path) -> None:
    async with running(tmp_path, "valkey-server") as server:
        await _shares(server.url)


async def test_in_a_cluster(tmp_path: Path) -> None:
    """All keys of a question are in one slot."""
    async with cluster(tmp_path) as servers:
        await _shares(f"redis+cluster://{','.join(server.address for server in servers)}")
