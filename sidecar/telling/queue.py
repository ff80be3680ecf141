"""The queue as the admin API shows it: which requests wait, how long, against which bound, and why.

It is read between steps, and reading changes nothing. Only the oldest requests are asked why they wait, and for each
group its oldest one; the verdict says when that left some out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from policies.at_most import at_most
from sidecar.core import eligibility
from sidecar.core.eligibility import Why
from sidecar.core.state import Request, State
from sidecar.proto import admin_pb2
from sidecar.telling.groups import Group, groups_of, matching
from sidecar.telling.verdict import NOTHING, Beyond, Waiting, verdict_of
from sidecar.telling.waits import void_label

EXAMINED_MAX = 1_000
"""Requests of one view whose reason to wait is computed, oldest first."""
EXAMINED_OFTEN_MAX = 100
"""The same for a verdict that is made every second."""


def queue_message(
    state: State,
    now_ns: int,
    adapter: str = "",
    backend: str = "",
    limit: int = 100,
    tenant: str | None = None,
    beyond: Beyond = NOTHING,
) -> Any:
    """Return the queue, or the part of it for one adapter, backend or tenant, without what runs.

    Lists at most `limit` requests and groups, and examines at most `EXAMINED_MAX` requests, oldest first. Groups that
    wait come first, the longest wait first, then those that only run, the largest first. The verdict begins with what
    is wrong with the pool, unless the view is confined to a tenant.
    """
    groups = groups_of(state, adapter, backend, tenant)
    oldest = _oldest(state, now_ns, EXAMINED_MAX, adapter, backend, tenant)
    counts = Counter(why for _, why in oldest)
    groups.sort(key=Group.age)
    return admin_pb2.QueueResponse(
        verdict=verdict_of(state, now_ns, groups, oldest, tenant, beyond),
        waiting=sum(group.waiting for group in groups),
        running=sum(group.running for group in groups),
        requests=(waiting_message(request, why, now_ns) for request, why in oldest[:limit]),
        why=(
            admin_pb2.WhyCount(why=why.value, count=count)
            for why, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0].value))
        ),
        groups=(group_message(state, group, now_ns) for group in groups[:limit]),
        groups_total=len(groups),
    )


def verdict(state: State, now_ns: int, groups: list[Group], tenant: str | None, beyond: Beyond) -> str:
    """Return the verdict of `queue_message` for groups that are known; it looks at fewer requests."""
    return verdict_of(state, now_ns, groups, _oldest(state, now_ns, EXAMINED_OFTEN_MAX, "", "", tenant), tenant, beyond)


def _oldest(state: State, now_ns: int, most: int, adapter: str, backend: str, tenant: str | None) -> list[Waiting]:
    oldest = at_most(most, matching(state, adapter, backend, tenant, running=False))
    return [(request, eligibility.why_waiting(state, request, now_ns)) for request in oldest]


def waiting_message(request: Request, why: Why, now_ns: int) -> Any:
    view, promise = request.view, request.promise
    return admin_pb2.WaitingRequest(
        request=request.id,
        request_id=request.client_id,
        adapter=view.name,
        tenant=view.tenant,
        backend=request.backend or "",
        waited_s=(now_ns - view.arrived_ns) / 1e9,
        bound_s=0.0 if promise is None else promise.bound_ns / 1e9,
        expires_s=(request.expires_ns - view.arrived_ns) / 1e9,
        voided=void_label(request.voided),
        why=why.value,
        **{"class": view.klass},  # a keyword of Python's
    )


def oldest_message(state: State, oldest: Request, now_ns: int) -> Any:
    """Return a waiting request with its reason to wait."""
    return waiting_message(oldest, eligibility.why_waiting(state, oldest, now_ns), now_ns)


def group_message(state: State, group: Group, now_ns: int) -> Any:
    return admin_pb2.QueueGroup(
        adapter=group.adapter,
        tenant=group.tenant,
        backend=group.backend,
        waiting=group.waiting,
        running=group.running,
        tokens=group.tokens,
        oldest=None if group.oldest is None else oldest_message(state, group.oldest, now_ns),
    )
