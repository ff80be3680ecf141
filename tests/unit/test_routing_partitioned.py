"""`partitioned` on a pool in miniature: balance, loads, bounded moves, replicas, a backend lost and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from policies.routing.affinity import Affinity
from policies.routing.partitioned import PERIOD_NS, Partitioned
from policies.routing.placement import Home
from policies.routing.proportional import Proportional
from policies.routing.rendezvous import ranked
from policies.views import BASE, Candidate, Waiting
from sidecar.lab.conformance.routing import Listed
from sidecar.lab.conformance.seeds import through_json
from tests.kit.routing_pool import SECOND, Pool, engines

BACKENDS = ("b0", "b1", "b2", "b3")


def round_robin(count: int = 64) -> Callable[[int], str]:
    return lambda number: f"a{number % count}"


def zipf(seed: int, count: int = 64, drift_every: int = 0) -> Callable[[int], str]:
    """Draw by 1/(i+1); with `drift_every`, a tenth of the versions change places that often."""
    random, ids = Random(seed), list(range(count))
    weights = [1 / (rank + 1) for rank in range(count)]

    def draw(number: int) -> str:
        if drift_every and number and number % drift_every == 0:
            for _ in range(count // 10):
                one, other = random.randrange(count), random.randrange(count)
                ids[one], ids[other] = ids[other], ids[one]
        return f"a{ids[random.choices(range(count), weights)[0]]}"

    return draw


def homes(policy: Partitioned) -> dict[str, Home]:
    return policy._placement.homes


def hosted(policy: Partitioned) -> list[int]:
    return [len(held) for held in policy._placement.hosted(BACKENDS).values()]


# A pool at work.


def test_sixty_four_on_four_times_sixteen_slots() -> None:
    """Uniform adapters settle sixteen to a backend at their first request: one load each, and no move ever."""
    pool = Pool(Partitioned(), round_robin(), engines())
    figures = pool.run(120, 512)
    assert hosted(pool.policy) == [16, 16, 16, 16]
    assert all(len(home.hosts) == 1 for home in homes(pool.policy).values())
    assert (figures.loads, figures.moves) == (64, 0)
    assert figures.loads_per_request <= 0.02


def test_a_request_looks_at_its_hosts() -> None:
    """On sixteen backends with 512 in flight a pick builds little more than one candidate, reviews included."""
    pool = Pool(Partitioned(), round_robin(64), engines(16))
    pool.run(30, 512)
    assert sum(pool.looked) / len(pool.looked) < 1.5


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
@pytest.mark.parametrize("drift_every", [0, 2000])
def test_skewed_loads_are_balanced_by_few_moves(seed: int, drift_every: int) -> None:
    """Zipf 1.0, at rest and drifting: over every peer's throughput, with its few loads paid for by few moves."""
    pool = Pool(Partitioned(), zipf(seed, drift_every=drift_every), engines())
    figures = pool.run(120, 512)
    assert hosted(pool.policy) == [16, 16, 16, 16]
    assert figures.moves <= 40
    assert figures.loads_per_request <= 0.03
    for peer in (Affinity(), Proportional()):
        assert figures.tokens >= Pool(peer, zipf(seed, drift_every=drift_every), engines()).run(120, 512).tokens


def test_a_lost_backend_moves_its_own_and_gets_them_back() -> None:
    """Its sixteen go elsewhere, nobody else moves; back again, sixteen return at once: slots are even."""
    pool = Pool(Partitioned(), round_robin(), engines())
    before = pool.run(60, 512)
    were = {version: list(home.hosts) for version, home in homes(pool.policy).items()}
    pool.lose("b2")
    pool.run(60, 512)
    moved = [version for version, home in homes(pool.policy).items() if home.hosts != were[version]]
    assert sorted(moved) == sorted(version for version, hosts in were.items() if hosts == ["b2"])
    assert pool.policy.moves == 16

    pool.engines["b2"].up = True
    first = pool.run(10, 512)
    assert first.moves == 16
    rest = pool.run(40, 512)
    assert first.moves + rest.moves == 16
    assert hosted(pool.policy) == [16, 16, 16, 16]
    again = sum(homes(pool.policy)[version].hosts == hosts for version, hosts in were.items())
    assert again >= 40
    assert pool.run(15, 512).tokens >= 0.95 * before.tokens


def test_a_slower_backend_is_given_less() -> None:
    """Half as fast as the others, it ends up with about a seventh of the tokens, not a quarter of the work."""
    pool = Pool(Partitioned(), zipf(5), engines())
    pool.engines["b1"].speed = 0.5
    pool.run(120, 512)
    tokens = {engine.id: engine.tokens for engine in pool.engines.values()}
    assert tokens["b1"] / sum(tokens.values()) == pytest.approx(1 / 7, rel=0.25)
    assert max(len(engine.queue) for engine in pool.engines.values()) < 100


def test_more_adapters_than_slots_are_spread_evenly() -> None:
    """256 on 64 slots: the same number on each backend, and still one home each."""
    pool = Pool(Partitioned(), round_robin(256), engines())
    pool.run(30, 512)
    assert hosted(pool.policy) == [64, 64, 64, 64]


def test_a_pool_goes_on_the_same_after_a_restore() -> None:
    """The policy written down and read back in the middle of a run leaves the rest of the run as it was."""

    def run(restored: bool) -> tuple[float, int, list[int]]:
        pool = Pool(Partitioned(), zipf(7, drift_every=2000), engines())
        pool.run(40, 512)
        if restored:
            snapshot = through_json(pool.policy.snapshot())
            pool.policy = Partitioned()
            pool.policy.restore(snapshot)
        figures = pool.run(60, 512)
        return figures.tokens, figures.moves, pool.looked

    assert run(restored=True) == run(restored=False)


# One decision at a time.


def request(version: str, tokens: int = 100, number: int = 1) -> Waiting:
    return Waiting(number, version, version, "t", "default", 0, 0, tokens)


def candidate(backend: str, **changes: object) -> Candidate:
    usual = Candidate(
        backend=backend, resident=True, open=True, awaited=True, held=1, running=10, queued=0, seats=100, slots=16,
        slots_free=8, pages=1, work_tokens=1000, tokens_per_s=1000.0,
    )  # fmt: skip
    return replace(usual, **changes)  # type: ignore[arg-type]


def offered(**changes: dict[str, object]) -> Listed:
    return Listed([candidate(backend, **changes.get(backend, {})) for backend in BACKENDS])


def settled(version: str = "sql") -> tuple[Partitioned, str]:
    """Return a policy that has placed a version, and where."""
    policy = Partitioned()
    return policy, policy.pick(request(version), offered(), 0).backend


def test_a_host_keeps_its_version_while_others_idle() -> None:
    """Others with nothing to do are no reason to load an adapter twice."""
    policy, host = settled()
    idle = {backend: {"running": 0, "work_tokens": 0} for backend in BACKENDS if backend != host}
    choice = policy.pick(request("sql"), offered(**idle), 1)
    assert (choice.backend, choice.reason) == (host, "host")


def test_a_full_host_over_its_share_is_passed_over() -> None:
    """100 seats, 120 of 150 in flight where a quarter is 38: the next in rank gets it, and it counts as a vote."""
    policy, host = settled()
    policy.pick(request("sql"), offered(), 1)
    busy = offered(**{host: {"running": 100, "queued": 20, "work_tokens": 9000}})
    choice = policy.pick(request("sql"), busy, 2)
    assert choice.backend != host
    assert choice.reason == "hosts over their share"
    assert homes(policy)["sql"].votes == 1


def test_a_host_with_a_seat_is_not_passed_over() -> None:
    """99 of 129 in flight, but 100 seats: nobody would wait."""
    policy, host = settled()
    busy = offered(**{host: {"running": 99, "work_tokens": 9000}})
    assert policy.pick(request("sql"), busy, 1).backend == host


def test_a_full_pool_keeps_to_its_hosts() -> None:
    """Everybody has 120 in flight for 100 seats: it would wait anywhere."""
    policy, host = settled()
    full = {one: {"running": 100, "queued": 20, "work_tokens": 9000} for one in BACKENDS}
    assert policy.pick(request("sql"), offered(**full), 1).backend == host


def test_slots_that_are_spoken_for_are_not_displaced() -> None:
    """Where every slot is another's a request would wait for one, however idle the seats: it stays with its host."""
    policy = Partitioned()
    for number in range(64):
        policy.pick(request(f"v{number}"), offered(), 0)
    host = homes(policy)["v0"].hosts[0]
    busy = {host: {"running": 100, "queued": 20, "work_tokens": 9000}}
    assert policy.pick(request("v0"), offered(**busy), 1).backend == host


def test_a_new_version_goes_where_least_is_in_flight() -> None:
    """Three backends with twenty in flight and one with five; an idle pool goes by rank."""
    policy = Partitioned()
    busy = {one: {"running": 20} for one in ("b0", "b1", "b3")}
    assert policy.pick(request("first"), offered(**busy, b2={"running": 5}), 0).backend == "b2"
    idle = offered(**{one: {"running": 0} for one in BACKENDS})
    for number in range(8):
        rank = ranked(f"v{number}", dict.fromkeys(BACKENDS, 1.0))
        assert policy.pick(request(f"v{number}"), idle, number).backend == rank[0]


def hot(policy: Partitioned, now_ns: int, until_ns: int, pool: Listed) -> int:
    """Ask for one version at 1,000 tokens a second, for several others at a tenth of that."""
    while now_ns < until_ns:
        policy.pick(request("hot", 1000), pool, now_ns)
        for number in range(10):
            policy.pick(request(f"v{number}", 100), pool, now_ns)
        now_ns += SECOND
    return now_ns


def test_a_hot_version_gets_hosts_one_by_one_and_gives_them_back() -> None:
    """A quarter of what four backends can do wants a second host: it comes after two periods, not one."""
    policy, pool = Partitioned(), offered()
    now_ns = hot(policy, 0, PERIOD_NS, pool)
    assert len(homes(policy)["hot"].hosts) == 1
    now_ns = hot(policy, now_ns, 2 * PERIOD_NS + 2 * SECOND, pool)
    assert len(homes(policy)["hot"].hosts) == 2
    assert all(len(homes(policy)[f"v{number}"].hosts) == 1 for number in range(10))
    for later in range(1, 20):
        policy.pick(request("other", 1000), pool, now_ns + later * PERIOD_NS)
    assert "hot" not in homes(policy) or len(homes(policy)["hot"].hosts) == 1


def test_replicas_share_by_work() -> None:
    """Of two hosts the one with less to do is picked."""
    policy, _ = settled()
    home = homes(policy)["sql"]
    other = next(backend for backend in BACKENDS if backend not in home.hosts)
    policy._placement.add_host("sql", other)
    for busy, free in (home.hosts, home.hosts[::-1]):
        assert policy.pick(request("sql"), offered(**{busy: {"work_tokens": 5000}}), 1).backend == free


def test_unknown_slots_are_no_obstacle() -> None:
    """Backends that do not say how many they can have open get equal numbers."""
    unknown = Listed([candidate(backend, slots=None, slots_free=None, tokens_per_s=0.0) for backend in BACKENDS])
    policy = Partitioned()
    for number in range(40):
        policy.pick(request(f"v{number}"), unknown, number)
    assert hosted(policy) == [10, 10, 10, 10]


def test_base_model_requests_go_to_the_better_of_two() -> None:
    """They need no home, and a backend with much to do is better than neither of its neighbours."""
    policy = Partitioned()
    pool = offered(b1={"running": 80, "work_tokens": 9000})
    picked = [policy.pick(request(BASE, number=number), pool, number).backend for number in range(8)]
    assert "b1" not in picked
    assert [picked.count(one) for one in ("b0", "b2", "b3")] == [2, 4, 2]
    assert homes(policy) == {}


def test_a_prompt_too_long_for_its_host_is_served_elsewhere() -> None:
    """A request that was not offered the host goes to another; the home follows, so it is loaded there once."""
    policy, host = settled()
    without = Listed([candidate(backend) for backend in BACKENDS if backend != host])
    stand_in = policy.pick(request("sql"), without, 1).backend
    assert stand_in != host
    assert policy.pick(request("sql"), without, 2).backend == stand_in
    assert policy.moves == 1


def test_a_backend_that_is_gone_for_good_is_no_host_any_more() -> None:
    """Where it was one of several, at once; what lived there alone moves when it is asked for."""
    policy, host = settled("sql")
    home = homes(policy)["sql"]
    other = next(backend for backend in BACKENDS if backend != host)
    policy._placement.add_host("sql", other)
    policy.backend_removed(host)
    assert home.hosts == [other]
    assert policy._placement.pages == {other: 1}
    policy.backend_removed(other)
    assert home.hosts == [other]  # a version lives somewhere as long as it is known
    left = Listed([candidate(backend) for backend in BACKENDS if backend not in (host, other)])
    assert policy.pick(request("sql"), left, 0).backend not in (host, other)
    assert set(policy._placement.pages) <= set(left.backends)


def test_a_backend_that_comes_is_given_its_share_soon() -> None:
    """A second after it is seen first: what is asked for until then is known to have it to choose from."""
    policy = Partitioned()
    before = Listed([candidate(backend) for backend in BACKENDS[:3]])
    for number in range(48 * 20):  # enough to tell an imbalance from chance
        policy.pick(request(f"v{number % 48}"), before, number)
    moved = []
    for now_ns in (SECOND, 2 * SECOND, 2 * SECOND + 1):
        moved.append(policy.moves)
        for number in range(48):
            policy.pick(request(f"v{number}"), offered(), now_ns)
    assert moved[1] == 0
    assert policy.moves > 0
