"""Admit a request: resolve its name, check the limits, choose a backend."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from policies.views import BASE, Waiting
from sidecar.core import causes, eligibility, promising, queueing
from sidecar.core.causes import Declined
from sidecar.core.config import ClassLimit
from sidecar.core.effects import Settle
from sidecar.core.enums import outcome_of
from sidecar.core.events import Received
from sidecar.core.state import Backend, Name, Queued, Request, State
from sidecar.core.step import Step
from sidecar.errors import Reason
from sidecar.model.reference import BASE_NAMES, Reference, selected

RETRY_AFTER_NS = 1_000_000_000


def received(step: Step, event: Received) -> None:
    """Admit a request and queue it, or settle it at once with the reason."""
    state = step.state
    try:
        name, ordinal = _resolve(state, event)
        digest = name.versions[ordinal] if name is not None else BASE
        event = _counted(state, event, digest)
        limit = _admit(state, event, name, digest, step.now_ns)
        _find_server(state, event, name, digest)
    except Declined as declined:
        _refuse(step, event, declined)
        return
    request = _request(step, event, name, ordinal, digest, limit)
    backend = queueing.pick_backend(step, request)
    if backend is not None:
        try:
            _in_time(step, request, backend, limit)
        except Declined as declined:
            queueing.take_back(step, request, backend)
            _refuse(step, event, declined)
            return
    state.requests[request.id] = request
    if digest != BASE:
        state.versions[digest].requests += 1
        state.versions[digest].used_ns = step.now_ns
    state.set_timer(request.expires_ns, request.id)
    if event.deadline_ns is not None and event.deadline_ns != request.expires_ns:
        state.set_timer(event.deadline_ns, request.id)
    queueing.place(step, request, backend)


def places(state: State, event: Received) -> tuple[str, tuple[Backend, ...]]:
    """Return the version that a request names and the backends that can serve it, whichever replica owns them.

    Raise Declined for an unknown name or version.
    """
    name, ordinal = _resolve(state, event)
    digest = name.versions[ordinal] if name is not None else BASE
    servers = eligibility.among(eligibility.servers_of(state, digest), event.only)
    return digest, tuple(each for each in servers if each.can_seat(event.sequences, state.config)) or servers


def _counted(state: State, event: Received, digest: str) -> Received:
    """Return the request with its output length capped at what an engine can generate.

    Only the accounting is capped: the bytes sent keep the client's value, which the engine refuses or cuts itself.
    Without the cap one client could lengthen every other client's promise at will.
    """
    config = state.config
    most = max(1, eligibility.longest_sequence(state, digest, event.only) - event.input_tokens) * event.sequences
    tokens = min(event.output_tokens_max or config.output_tokens_assumed, most)
    return event if tokens == event.output_tokens_max else replace(event, output_tokens_max=tokens)


def _request(step: Step, event: Received, name: Name | None, ordinal: int, digest: str, limit: ClassLimit) -> Request:
    expires_ns = step.now_ns + limit.queue_wait_ns_max
    if event.deadline_ns is not None:
        expires_ns = min(expires_ns, event.deadline_ns)
    view = Waiting(
        id=event.request,
        version=digest,
        name=name.name if name is not None else "",
        tenant=event.tenant,
        klass=event.klass,
        arrived_ns=step.now_ns,
        input_tokens=event.input_tokens,
        output_tokens_max=event.output_tokens_max,
        weight=step.state.config.weight_of(event.tenant),
        sequences=event.sequences,
    )
    return Request(view, ordinal, expires_ns, event.deadline_ns, event.size_bytes, event.only, event.client_id)


def _resolve(state: State, event: Received) -> tuple[Name | None, int]:
    """Return the name and version ordinal that the client's reference resolves to; (None, 0) for the base model."""
    if event.adapter in BASE_NAMES and event.adapter not in state.names:
        if not state.config.base_requests:
            raise Declined(Reason.INVALID_REQUEST, causes.NoAdapterNamed())
        return None, 0
    text, selector = Reference.of(event.adapter)
    name = state.names.get(text)
    if name is None:
        raise Declined(Reason.UNKNOWN_ADAPTER, unknown_adapter(state, text, event.tenant), text[:80])
    _allowed(event, name)  # first: only a tenant that may use the adapter may learn its versions
    if not selector:
        return name, _permitted(name, event, _share(name, event))
    ordinal = selected(selector, name.versions.items())
    if ordinal is None or not _may_answer(event, ordinal):
        known = tuple((n, version) for n, version in sorted(name.versions.items()) if _may_answer(event, n))
        raise Declined(Reason.UNKNOWN_ADAPTER, causes.UnknownVersion(text, selector[:80], known), text)
    return name, ordinal


def name_in(state: State, reference: str) -> str:
    """Return the name in a client's reference, whether or not it is registered; "" if it means the base model."""
    if reference in BASE_NAMES and reference not in state.names:
        return ""
    return Reference.of(reference).name or reference


def _may_answer(event: Received, ordinal: int) -> bool:
    return event.versions is None or ordinal in event.versions


def _permitted(name: Name, event: Received, ordinal: int) -> int:
    """Return an ordinal if it may answer, else the newest one that may. Raise Declined(NOT_ALLOWED) if none may.

    A replica that learns of a promotion later than this one has asked the policy for the version before it.
    """
    if event.versions is None or ordinal in event.versions:
        return ordinal
    newest = max((each for each in event.versions if each in name.versions), default=None)
    if newest is None:
        raise _not_allowed(event, name)
    return newest


def _share(name: Name, event: Received) -> int:
    """Return the current version, or the canary if this tenant and session fall into its share.

    All requests of a session get the same version while the share stays; a request without a session is drawn alone.
    """
    if name.canary is None:
        return name.current
    ordinal, percent = name.canary
    if not _may_answer(event, ordinal):
        return name.current
    text = f"{name.name}\0{event.tenant}\0{event.session or event.request}"
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return ordinal if place < percent else name.current


def unknown_adapter(state: State, text: str, tenant: str | None = None) -> causes.UnknownAdapter:
    """Return what is told of a name unknown to a tenant, with the nearest known names. A tenant of None is an operator.

    It is the same for a name that is not registered and for one that the tenant may not use.
    """
    usable = [name for name, known in state.names.items() if tenant is None or known.is_for(tenant)]
    return causes.UnknownAdapter(text[:160], tuple(eligibility.nearest(text, usable)), not usable, tenant)


def with_name(state: State, settle: Settle, reference: str) -> Settle:
    """Return an ending as those see it who count and log: with the name in the request's reference.

    A refusal has a name only if it is about that; clients are told no other, since a task id may stand for it.
    """
    return settle if settle.name else replace(settle, name=name_in(state, reference))


def for_client(state: State, settle: Settle) -> Settle:
    """Return an ending as the client may see it: a name that the tenant may not use looks unknown."""
    if settle.reason is not Reason.NOT_ALLOWED:
        return settle
    cause = unknown_adapter(state, settle.name, settle.tenant)
    return replace(settle, reason=Reason.UNKNOWN_ADAPTER, cause=cause, name=settle.name[:80])


def _admit(state: State, event: Received, name: Name | None, digest: str, now_ns: int) -> ClassLimit:
    """Return the limits of the request's class. Raise Declined when the request may not queue."""
    config = state.config
    if state.draining:
        raise Declined(Reason.DRAINING, causes.ShuttingDown())
    if name is not None:
        _not_quarantined(state, name, digest)
    limit = config.classes.get(event.klass)
    if limit is None:
        raise Declined(Reason.INVALID_REQUEST, causes.UnknownClass(event.klass[:80], tuple(sorted(config.classes))))
    if event.deadline_ns is not None and event.deadline_ns <= now_ns:
        raise Declined(Reason.DEADLINE_UNMEETABLE, causes.DeadlineBefore())
    _has_room(state, event)
    return limit


def _has_room(state: State, event: Received) -> None:
    """Check the queue's limits on requests, tokens and bytes, in total and per tenant. Raise Declined at a limit."""
    config, tokens, size_bytes = state.config, event.input_tokens + event.output_tokens_max, event.size_bytes
    tenant = None
    over = state.waiting.over(tokens, size_bytes, config.queued_max, config.queued_tokens_max, config.queued_bytes_max)
    if over is None:
        tenant = event.tenant
        over = (state.tenant_queued.get(event.tenant) or Queued()).over(
            tokens,
            size_bytes,
            config.tenant_queued_max,
            config.tenant_queued_tokens_max,
            config.tenant_queued_bytes_max,
        )
    if over is not None:
        raise Declined(Reason.QUEUE_FULL, causes.QueueFull(*over, tenant), retry_after_ns=RETRY_AFTER_NS)


def _in_time(step: Step, request: Request, backend: Backend, limit: ClassLimit) -> None:
    """Refuse a request whose predicted wait exceeds its class's longest wait or its deadline."""
    wait_ns = queueing.promise(step, request, backend)
    over_ns = wait_ns - limit.queue_wait_ns_max
    if over_ns > 0:
        too_long = causes.WaitTooLong(backend.id, wait_ns, request.view.klass, limit.queue_wait_ns_max)
        raise Declined(Reason.QUEUE_FULL, too_long, retry_after_ns=max(over_ns, RETRY_AFTER_NS))
    first_token_ns = wait_ns + promising.reading_ns(backend, request)
    if request.deadline_ns is not None and step.now_ns + first_token_ns > request.deadline_ns:
        left_ns = request.deadline_ns - step.now_ns
        raise Declined(Reason.DEADLINE_UNMEETABLE, causes.DeadlineTooSoon(backend.id, first_token_ns, left_ns))


def _allowed(event: Received, name: Name) -> None:
    """Raise Declined(NOT_ALLOWED) unless the allow list, or a policy that named versions, lets the tenant use it."""
    if event.versions is None and not name.is_for(event.tenant):
        raise _not_allowed(event, name)


def _not_allowed(event: Received, name: Name) -> Declined:
    cause = causes.NotAllowed(event.tenant, name.name, event.versions is not None)
    return Declined(Reason.NOT_ALLOWED, cause, name.name)


def _not_quarantined(state: State, name: Name, digest: str) -> None:
    suspicion = state.versions[digest].quarantined
    if suspicion is not None:
        raise Declined(Reason.QUARANTINED, causes.Quarantined(suspicion), name.name)


def _find_server(state: State, event: Received, name: Name | None, digest: str) -> None:
    servers = eligibility.among(eligibility.servers_of(state, digest), event.only)
    for server in servers:
        if (
            server.owned
            and eligibility.long_enough(server, event.input_tokens)
            and server.can_seat(event.sequences, state.config)
        ):
            return
    text = name.name if name is not None else "base model"
    if not servers:
        if eligibility.are_gone(state, event.only):
            raise Declined(Reason.NOT_OWNER, causes.Gone(event.only), text)
        if eligibility.may_come(state, digest, event.only):
            return
        cause = eligibility.no_backend(state, digest)
        raise Declined(Reason.NO_BACKEND, cause, text, RETRY_AFTER_NS)
    if not any(server.owned for server in servers):
        raise Declined(Reason.NOT_OWNER, causes.NotOwned(tuple(server.id for server in servers)), text)
    if not any(eligibility.long_enough(backend, event.input_tokens) for backend in servers):
        longest = max(backend.facts.input_tokens_max or 0 for backend in servers)
        raise Declined(Reason.INVALID_REQUEST, causes.PromptTooLong(event.input_tokens, longest))
    if not any(backend.can_seat(event.sequences, state.config) for backend in servers):
        most = max(backend.seats_at_best(state.config) for backend in servers)
        raise Declined(Reason.INVALID_REQUEST, causes.TooManySequences(event.sequences, most))


def _refuse(step: Step, event: Received, declined: Declined) -> None:
    step.emit(
        Settle(
            request=event.request,
            outcome=outcome_of(declined.reason),
            name=declined.name,
            tenant=event.tenant,
            klass=event.klass if event.klass in step.state.config.classes else "default",
            queue_ns=0,
            input_tokens=event.input_tokens,
            reason=declined.reason,
            cause=declined.cause,
            retry_after_ns=declined.retry_after_ns,
        )
    )
