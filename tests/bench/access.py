"""CPU time of who calls and what it may do: kept in the cache, decided anew, for lists, and the memory of it."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter, process_time_ns

import psutil

from sidecar.access.access import Access
from sidecar.access.cedar_text import statements_of
from sidecar.access.configured import policy_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.entries import Key
from sidecar.access.external import ExternalCheck
from sidecar.access.keys import KeyBook, new_secret
from sidecar.access.policy import READY, Roles
from sidecar.access.policy_file import SCHEMA, CedarPolicy
from sidecar.access.principal import INFERENCE, Action, Head, Policy, Presented, Principal, Proof, Resource, Sort
from sidecar.access.resources import adapter_resource
from sidecar.access.store import AccessStore
from sidecar.access.tokens import Tokens
from sidecar.config.access import Policies
from sidecar.config.identity import External, Identity
from sidecar.state.records import Record, added
from tests.bench.figures import Figure, middle
from tests.kit.corekit import adapter_of
from tests.kit.tokens import TokenMaker

ROUNDS, QUESTIONS = 5, 2_000
NAMES, TENANTS = 5_000, 1_000_000
GOAL_US = 40.0
CHECKS, CHECKS_AT_ONCE = 1_600, 32
REFERENCE_BYTES = 4096

THREE = """\
permit (principal in Role::"operator", action, resource);
permit (principal, action in Action::"use", resource) when { resource has prefix && resource.prefix == principal };
permit (principal, action in Action::"use", resource) when { resource has allow && resource.allow.contains(principal) };
"""
OF_TENANTS = THREE + "\n".join(
    f'permit (principal == Tenant::"t{number}", action, resource in Folder::"f{number}");' for number in range(997)
)
OF_ALL = THREE + "\n".join(f'permit (principal, action, resource in Folder::"f{number}");' for number in range(997))


async def bench(folder: Path) -> list[Figure]:
    machine_us = middle([_machine_us() for _ in range(ROUNDS)])
    figures = []

    def add(name: str, value_us: float, goal: float | None = None) -> None:
        beside = f"SHA-256 of {REFERENCE_BYTES:,} bytes on this machine"
        figures.append(Figure(f"access: {name}", value_us, "µs", machine_us, beside, "value", goal))

    record, _ = added(None, "acme/sql", adapter_of("one"), "/a", now=0.0)
    for name, value_us in (await _whole(folder, record)).items():
        add(f"identity by {name} and policy, kept", value_us, GOAL_US)
    cpu_us, waited_us = await _external_us()
    add("an external check, its answer awaited alone", waited_us)
    add("an external check, CPU of this process with 32 under way", cpu_us)
    resource = adapter_resource(record)
    cached = policy_of(Policies(ready="tenant_prefix"))
    add("policy, kept", _decision_us(cached, resource))
    policies: dict[str, Policy] = {"the ready set": READY["tenant_prefix"](Roles({}), "/")}
    texts = {"3 Cedar policies": THREE, "1,000, of other tenants": OF_TENANTS, "1,000, of everybody": OF_ALL}
    policies |= {name: CedarPolicy(statements_of(text, SCHEMA), Roles({}), "/") for name, text in texts.items()}
    for name, policy in policies.items():
        add(f"policy, decided anew by {name}", _decision_us(policy, resource))
    for name in ("the ready set", "3 Cedar policies"):
        figures += await _list(name, policies[name])
    return [*figures, await _memory()]


def _machine_us() -> float:
    data = bytes(REFERENCE_BYTES)
    began = process_time_ns()
    for _ in range(QUESTIONS):
        sha256(data).digest()
    return (process_time_ns() - began) / QUESTIONS / 1e3


async def _whole(folder: Path, record: Record) -> dict[str, float]:
    """Return by the kind of credential what one request costs: it becomes a principal, which may use the name."""
    issuer = TokenMaker(folder)
    identity = Identity.model_validate(
        {
            "mode": "enforce",
            "certificates": {"enabled": True, "tenant_pattern": "spiffe://*/ns/{tenant}/sa/*"},
            "issuers": [issuer.entry],
        }
    )
    store = AccessStore(folder)
    key_id, secret, digest = new_secret()
    await store.start()
    await store.put(Key(id=key_id, sha256=digest, tenant="acme", roles=(), groups=(), klass="", created_at=0.0))
    keys, tokens = KeyBook(store, None, 3600.0), Tokens(identity.issuers, folder)
    keys.start()
    tokens.start()
    policy = policy_of(Policies(ready="tenant_prefix"))
    access = Access(identity, "none", {record.name: record}.get, policy, None, keys=keys, tokens=tokens)
    presented = {
        "a certificate": Presented(certificate=("spiffe://cluster.local/ns/acme/sa/default",)),
        "an API key": Presented(authorization=(f"Bearer {secret}",)),
        "a token": Presented(authorization=(f"Bearer {issuer.token('acme')}",)),
    }

    async def ask(credential: Presented) -> None:
        access.permit(await access.identify(credential), record.name, "id")

    try:
        return {
            name: middle([await _round_us(partial(ask, credential)) for _ in range(ROUNDS)])
            for name, credential in presented.items()
        }
    finally:
        await tokens.stop()
        await keys.close()
        await store.close()


async def _external_us() -> tuple[float, float]:
    """Return what a check costs this process, and how long it takes; its server is a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kit.authorization", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    check = ExternalCheck(External(address=address, timeout_s=10))
    check.start()
    headers = (("authorization", f"Bearer {'a' * 900}"), ("x-request-id", "0" * 32), ("user-agent", "bench"))
    head = Head("POST", "/lorasidecar.v1.Gateway/Generate", "HTTP/2", headers=headers)
    presented, proven = Presented(peer="127.0.0.1:5", head=head), Principal("acme", Proof.TOKEN, "somebody")

    async def ask(count: int = 1) -> None:
        for _ in range(count):
            await check.check(presented, INFERENCE, proven)

    async def cpu_us() -> float:
        began = process_time_ns()
        await asyncio.gather(*(ask(CHECKS // CHECKS_AT_ONCE) for _ in range(CHECKS_AT_ONCE)))
        return (process_time_ns() - began) / CHECKS / 1e3

    async def waited_us() -> float:
        began = perf_counter()
        await ask(CHECKS)
        return (perf_counter() - began) / CHECKS * 1e6

    try:
        await ask(100)
        return middle([await cpu_us() for _ in range(ROUNDS)]), middle([await waited_us() for _ in range(ROUNDS)])
    finally:
        await check.stop()
        process.kill()
        await process.wait()


async def _round_us(ask: Callable[[], Awaitable[object]], count: int = QUESTIONS) -> float:
    gc.collect()
    began = process_time_ns()
    for _ in range(count):
        await ask()
    return (process_time_ns() - began) / count / 1e3


def _decision_us(policy: Policy, resource: Resource) -> float:
    principal = Principal("acme", Proof.KEY)
    assert policy.decide(principal, Action.INFER, resource).allowed
    rounds = []
    for _ in range(ROUNDS):
        gc.collect()
        began = process_time_ns()
        for _ in range(QUESTIONS):
            policy.decide(principal, Action.INFER, resource)
        rounds.append((process_time_ns() - began) / QUESTIONS / 1e3)
    return middle(rounds)


async def _list(name: str, policy: Policy) -> list[Figure]:
    """Return what a list of all names costs a tenant that sees a tenth of them, and how long others wait for it."""
    resources = [Resource(Sort.ADAPTER, f"t{number % 10}/a{number}") for number in range(NAMES)]
    principal = Principal("t1", Proof.KEY)
    changed = [Resource(Sort.ADAPTER, "t1/new"), *resources]
    colds, afters, warms, holds = [], [], [], []
    for _ in range(ROUNDS):
        cached = CachedPolicy(policy)
        waits = asyncio.create_task(_longest_wait_ms())
        began = process_time_ns()
        assert len(await cached.visible(principal, resources, 1)) == NAMES // 10
        colds.append((process_time_ns() - began) / 1e6)
        waits.cancel()
        holds.append(await waits)
        warms.append(await _round_us(lambda cached=cached: cached.visible(principal, resources, 1)))  # type: ignore[misc]
        began = process_time_ns()
        await cached.visible(principal, changed, 2)
        afters.append((process_time_ns() - began) / 1e6)
    title = f"access: {NAMES:,} names by {name}"
    return [
        Figure(f"{title}, first", middle(colds), "ms"),
        Figure(f"{title}, others wait at most", middle(holds), "ms"),
        Figure(f"{title}, again", middle(warms), "µs"),
        Figure(f"{title}, after a change", middle(afters), "ms", middle(colds), "the first list"),
    ]


async def _longest_wait_ms() -> float:
    """Return, when cancelled, how long the event loop was held at most."""
    longest_s = 0.0
    try:
        while True:
            began = perf_counter()
            await asyncio.sleep(0)
            longest_s = max(longest_s, perf_counter() - began)
    except asyncio.CancelledError:
        return longest_s * 1e3


async def _memory() -> Figure:
    """Return by how much the process has grown once so many tenants have each made a request and a list."""
    cached = policy_of(Policies(ready="tenant_prefix"))
    resources = [Resource(Sort.ADAPTER, f"t{number}/a") for number in range(10)]
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    for number in range(TENANTS):
        principal = Principal(f"t{number}", Proof.KEY)
        cached.decide(principal, Action.INFER, resources[0])
        await cached.visible(principal, resources, 1)
    gc.collect()
    grown = (process.memory_info().rss - before) / 1e6
    return Figure(f"access: memory after {TENANTS:,} tenants", grown, "MB")
