"""The first line of the queue: what is wrong with the pool, who waits, for how long, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from policies.views import BASE
from sidecar.core import eligibility
from sidecar.core.eligibility import Why
from sidecar.core.enums import Fault, Phase
from sidecar.core.state import Backend, Request, State
from sidecar.telling.durations import readable
from sidecar.telling.groups import Group
from sidecar.telling.misfits import label
from sidecar.telling.naming import called
from sidecar.telling.waits import FLOOD_MIN, FLOOD_SHARE, HOLDER_MIN, because, void_label

NAMED_MAX = 2
QUIET_NS = 2_000_000_000
"""An engine that runs something and has told nothing for so long is named, before it is suspected."""

Waiting = tuple[Request, Why]
"""A waiting request, and why it waits."""


@dataclass(frozen=True)
class Beyond:
    """What only the shell knows.

    `silent_ns` has how long nothing has come from a backend's engine, None if nothing has to; of a backend that it
    lacks the core's own count is taken. `passed_on` counts the requests of this replica's clients at others, by owner
    and its backend; both are "" for those that look for an owner. `succeeded` has the backends that are about to go and
    have a successor, which takes their id. `unwritten` has what cannot be written now: files, or what a Redis keeps.
    """

    silent_ns: Mapping[str, int | None] = field(default_factory=dict)
    passed_on: Mapping[tuple[str, str], int] = field(default_factory=dict)
    succeeded: Collection[str] = ()
    unwritten: Collection[str] = ()
    differing: Collection[str] = ()
    """Clauses for engines that seem to have other weights."""

    def silence_of(self, backend: Backend, now_ns: int) -> int | None:
        """Return how long nothing has come from a backend; None if nothing has to."""
        if not backend.in_flight:
            return None
        return self.silent_ns.get(backend.id, now_ns - backend.silence.since_ns)


NOTHING = Beyond()


def verdict_of(
    state: State, now_ns: int, groups: list[Group], oldest: list[Waiting], tenant: str | None, beyond: Beyond
) -> str:
    """Return what is wrong with the pool, how many wait, for how long and why; `oldest` are those that were asked why.

    Somebody who is confined to a tenant hears nothing of the pool.
    """
    waiting = sum(group.waiting for group in groups)
    running = sum(group.running for group in groups)
    holders = [] if tenant is not None else groups
    of_queue = _verdict(state, now_ns, oldest, waiting, running, _flood(groups, waiting), holders, beyond)
    if beyond.passed_on and not oldest:
        of_queue = of_queue.replace("nobody waits", "nobody waits here", 1)
    if tenant is not None:
        return "; ".join((*_elsewhere_unnamed(beyond), of_queue))
    longest = min((group.oldest for group in groups if group.oldest is not None), key=lambda r: r.id, default=None)
    empty = _idle(state, longest) if longest is not None else ()
    return "; ".join((*_troubles(state, now_ns, beyond), *_elsewhere(beyond), of_queue, *empty))


def _flood(groups: list[Group], waiting: int) -> str:
    """Return whose most of a long queue is: ", 58 of them for sql of tenant acme"; "" if it is nobody's."""
    if waiting < FLOOD_MIN:
        return ""
    adapters: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    for group in groups:
        adapters[group.adapter] += group.waiting
        tenants[group.tenant] += group.waiting
    del tenants[""]
    parts, counts = [], []
    for named, whose in ((adapters, "for {}"), (tenants, "of tenant {}")):
        name, count = max(named.items(), key=itemgetter(1), default=("", 0))
        if count >= FLOOD_SHARE * waiting:
            parts.append(whose.format(name or "the base model"))
            counts.append(count)
    return f", {'all' if min(counts) == waiting else min(counts)} of them {' '.join(parts)}" if parts else ""


def _holder(state: State, groups: list[Group], backends: Collection[str], whose: str) -> str:
    """Return who has most seats of some backends: ", 8 of 8 by tenant acme"; "" if nobody, or who floods the queue."""
    there = [group for group in groups if group.backend in backends]
    taken = sum(group.running for group in there)
    if taken < HOLDER_MIN or taken < sum(len(state.backends[each].running) for each in backends):
        return ""  # or only a part of the requests is looked at
    tenants: Counter[str] = Counter()
    for group in there:
        tenants[group.tenant] += group.running
    name, count = max(tenants.items(), key=itemgetter(1))
    is_told = not name or count < FLOOD_SHARE * taken or f"of tenant {name}" in whose
    return "" if is_told else f", {count} of {taken} by tenant {name}"


def _verdict(
    state: State,
    now_ns: int,
    oldest: list[Waiting],
    waiting: int,
    running: int,
    whose: str,
    holders: list[Group],
    beyond: Beyond,
) -> str:
    if not oldest:
        return f"nobody waits, {running} running" if running else "nobody waits, nothing runs"
    first, _ = oldest[0]
    since = f"{readable(now_ns - first.view.arrived_ns)} ({_limits(first)})"
    by_reason: dict[Why, list[Request]] = {}
    for request, reason in oldest:
        by_reason.setdefault(reason, []).append(request)
    why, requests = min(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0].value))
    backends = list(dict.fromkeys(request.backend for request in requests if request.backend))
    clause = _because(why, backends, requests)
    if why is Why.STALLED:
        suspected = [each.silence.since_ns for each in state.backends.values() if each.silence.suspected]
        clause += f" for {readable(now_ns - min(suspected, default=now_ns))}"
    elif why is Why.BACKEND_DOWN and not backends:
        clause = _leaving(state, requests[0], beyond) or clause
    elif why is Why.SEATS_FULL:
        clause += _holder(state, holders, backends, whose)
    count = len(requests)
    if waiting == 1:
        return f"1 waiting for {since} because {clause}"
    share = "all" if count == waiting else str(count)
    among = "them" if len(oldest) == waiting else f"the oldest {len(oldest)}"
    return f"{waiting} waiting{whose}, the oldest for {since}, {share} of {among} because {clause}"


def _limits(request: Request) -> str:
    """Return what was promised and when the request expires; once if both are the same."""
    expires_ns, promise = request.expires_ns - request.view.arrived_ns, request.promise
    expires = f"expires {readable(expires_ns)}"
    if promise is None:
        return f"bound void: {void_label(request.voided)}, {expires}" if request.voided else expires
    bound = f"bound {readable(promise.bound_ns)}"
    return bound if promise.bound_ns == expires_ns else f"{bound}, {expires}"


def _because(why: Why, backends: list[str], requests: list[Request]) -> str:
    """Return a reason as a clause about the backends and adapters of the requests for which it holds."""
    if why is Why.BACKEND_DOWN and backends:
        return f"nothing answers on {_joined(backends)}"
    adapters = list(dict.fromkeys(request.view.name or "the base model" for request in requests))
    return because(why, _joined(backends), _joined(adapters, "adapters"))


def _troubles(state: State, now_ns: int, beyond: Beyond) -> Iterator[str]:
    """Yield a clause for each thing that keeps requests from being answered, the gravest first."""
    backends = state.backends.values()
    if state.draining:
        running = sum(len(backend.running) for backend in backends)
        yield f"this process drains: it takes nothing new, {running} running and {state.queued} waiting"
    drained = list(_drained(state))
    if all(backend.draining for backend in backends):
        why = " and ".join(drained) or ("none has been found" if state.config.pools else "none is configured")
        then = "wait until one is found" if eligibility.may_come(state, BASE, ()) else "are refused"
        yield f"no backend takes requests: {why}; new requests {then}"
        drained.clear()
    down = [backend for backend in backends if backend.phase is Phase.DOWN]
    if down:
        share = "no backend is up" if len(down) == len(backends) and len(down) > 1 else ""
        yield f"{share or _named(down) + _is(down) + ' down'}{_since(down, now_ns)}"
        yield from _deadly(state, frozenset(backend.id for backend in down))
    yield from list(beyond.differing)[:NAMED_MAX]
    stalled = [each for each in backends if each.silence.suspected][:NAMED_MAX]
    quiet = [each for each in backends if not each.silence.suspected and silence(each, now_ns, beyond)][:NAMED_MAX]
    for backend in (*stalled, *quiet):
        found = f" ({backend.silence.found})" if backend.silence.found else ""
        yield f"{silence(backend, now_ns, beyond)}{_with_what(backend)}{found}"
    if beyond.unwritten:
        yield f"{' and '.join(beyond.unwritten)} cannot be written: the log says why"
    yield from drained


def _deadly(state: State, down: frozenset[str]) -> Iterator[str]:
    """Yield a clause for each quarantined version with which engines were lost that are down now."""
    for digest, version in state.versions.items():
        if version.quarantined and not down.isdisjoint(version.lost_backends):
            lost = [state.backends[each] for each in dict.fromkeys(version.lost_backends) if each in state.backends]
            yield f"{called(state, digest)} is quarantined, because {_named(lost)} ended with it"


def silence(backend: Backend, now_ns: int, beyond: Beyond = NOTHING) -> str:
    """Return that a backend is stalled, or quiet, and for how long; "" if it is neither."""
    if backend.silence.suspected:
        return f"{backend.id} is stalled: nothing came for {readable(now_ns - backend.silence.since_ns)}"
    silent_ns = 0 if backend.phase is not Phase.UP else beyond.silence_of(backend, now_ns) or 0
    return f"{backend.id} is quiet: nothing came for {readable(silent_ns)}" if silent_ns >= QUIET_NS else ""


def _elsewhere(beyond: Beyond) -> Iterator[str]:
    """Yield a clause for the requests of this replica's clients at each of the other replicas, and who to ask."""
    owners: dict[str, dict[str, int]] = {}
    for (owner, backend), count in sorted(beyond.passed_on.items()):
        owners.setdefault(owner, {})[backend] = count
    looking = sum(owners.pop("", {}).values())
    counts = {owner: sum(backends.values()) for owner, backends in owners.items()}
    first, rest = (ranked := sorted(owners, key=lambda owner: -counts[owner]))[:NAMED_MAX], ranked[NAMED_MAX:]
    for owner in first:
        yield f"{_of_ours(counts[owner])} at {owner}, which owns {_joined(list(owners[owner]))}: ask it"
    if rest:
        yield f"{_of_ours(sum(counts[owner] for owner in rest))} at {len(rest)} more: sidecar replicas list"
    if looking:
        yield f"{_of_ours(looking)} on the way to an owner of their engine"


def _elsewhere_unnamed(beyond: Beyond) -> Iterator[str]:
    """Yield the same in one clause, for somebody who may not see which replicas there are."""
    if count := sum(beyond.passed_on.values()):
        yield f"{count} {'request is' if count == 1 else 'requests are'} at another replica"


def _of_ours(count: int) -> str:
    return f"{count} of this replica's requests {'is' if count == 1 else 'are'}"


def _leaving(state: State, request: Request, beyond: Beyond) -> str:
    """Return the clause that backends which could serve a request are about to go; "" if none is."""
    gone = [backend for backend in eligibility.servers_for(state, request) if backend.leaving]
    followed = [backend for backend in gone if backend.id in beyond.succeeded]
    if not followed:
        return f"{_named(gone)}{_is(gone)} leaving" if gone else ""
    runs = f"{sum(len(backend.running) for backend in followed)} running"
    waits = "its successor waits for it" if len(followed) == 1 else "their successors wait for them"
    return f"{_named(followed)}{_is(followed)} leaving with {runs}, and {waits}"


def _idle(state: State, request: Request) -> Iterator[str]:
    """Yield a clause for the engines that do nothing while a request waits, with what keeps it from them."""
    empty: dict[str, list[Backend]] = {}
    for backend in state.backends.values():
        if backend.takes_requests and not backend.in_flight and not backend.queued and backend.id != request.backend:
            empty.setdefault(_why_not(state, backend, request), []).append(backend)
    for why, backends in sorted(empty.items())[:NAMED_MAX]:
        yield f"{_named(backends)}{_is(backends)} idle" + (f", but {why}" if why else "")


def _named(backends: list[Backend]) -> str:
    """Return "b0", "b0 and b1", or how many there are."""
    return _joined([backend.id for backend in backends])


def _joined(names: list[str], what: str = "backends") -> str:
    return " and ".join(names) if len(names) <= NAMED_MAX else f"{len(names)} {what}"


def _drained(state: State) -> Iterator[str]:
    for word, runs in (("draining", True), ("drained", False)):
        alike = [each for each in state.backends.values() if each.draining and bool(each.running) is runs]
        if alike:
            yield f"{_named(alike)}{_is(alike)} {word}"
    if going := [each for each in state.backends.values() if each.leaving and not each.draining]:
        yield f"{_named(going)}{_is(going)} leaving, {sum(len(each.running) for each in going)} running"


def _is(backends: list[Backend]) -> str:
    return " is" if len(backends) == 1 else " are"


def _since(down: list[Backend], now_ns: int) -> str:
    """Return when the last of some backends that are down was lost; "" if none was ever up."""
    lost = [note.at_ns for backend in down for note in backend.heals if note.reason == Fault.LOST.value]
    return f", lost {readable(now_ns - max(lost))} ago" if lost else ""


def _with_what(backend: Backend) -> str:
    loads = f", {len(backend.loads)} loading" if backend.loads else ""
    return f" with {len(backend.running)} running{loads}"


def _why_not(state: State, backend: Backend, request: Request) -> str:
    misfit = eligibility.cannot_serve(state, backend, request.version)
    if misfit is not None:
        return label(misfit)
    servers = eligibility.servers_for(state, request)
    if backend not in servers:
        return f"what waits is for {_named(list(servers)) if servers else 'others'}"
    return "" if eligibility.long_enough(backend, request.view.input_tokens) else "the prompt is too long for it"
