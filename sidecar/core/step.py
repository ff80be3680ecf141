"""One step in the making: the state, the time, the effects so far, and the acts that every part of the core shares."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from policies.lines import Line
from policies.views import BASE
from sidecar.core import eligibility, promising
from sidecar.core.effects import CancelRun, Drop, DropDisk, Effect, Heal, Settle
from sidecar.core.enums import Outcome, Voided
from sidecar.core.facts import is_files
from sidecar.core.routing_view import Offers
from sidecar.core.state import Backend, HealNote, Queued, Request, State
from sidecar.errors import Family, Reason


@dataclass
class Turn:
    """What one `step` works on. `dirty` names the backends whose queue may now be able to move."""

    state: State
    now_ns: int
    effects: list[Effect] = field(default_factory=list)
    dirty: dict[str, None] = field(default_factory=dict)
    hungry: bool = False
    """Something was fetched, freed or asked for: look at the fetches again."""
    taken_over: tuple[Backend, int] | None = None
    """Who has taken over which request last."""
    stuck: dict[str, None] = field(default_factory=dict)
    """Backends that could not send what they took over, for their policy lets nobody pass."""

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def heal(self, backend: Backend, reason: str, version: str) -> None:
        backend.heals.append(HealNote(self.now_ns, reason, version))
        self.emit(Heal(backend.id, reason, version))

    # Routing and the queue.

    def promise(self, request: Request, backend: Backend) -> int:
        """Tell a request that is being admitted how long it waits at most; return how long it is likely to."""
        self._count_outstanding(request, backend)
        backlog = promising.backlog_of(self.state, backend, request)
        request.fetch_allowed_ns = backlog.fetch_ns
        request.queued_clock = self.state.lateness.clock(self.now_ns)
        if backend.facts.base_apart and eligibility.others_of(self.state, backend, request):
            self.void_promises(backend, Voided.KEPT_APART)
        elif not backend.silence.suspected and promising.bounds_hold(self.state, backend, request.version):
            request.promise = backend.ordering.promise(request.view, backlog, self.now_ns)
        if backend.silence.suspected or not promising.wait_is_known(backend):
            return 0  # nobody is refused on a guess
        return backlog.queue_ns if request.promise is None else request.promise.expected_ns

    def take_back(self, request: Request, backend: Backend) -> None:
        """Forget a request that was told how long it would wait, and is refused for it."""
        backend.outstanding.queued_tokens -= request.expected_tokens
        self.no_longer_outstanding(request, backend)

    def route(self, request: Request) -> None:
        """Put a request that was queued or ran before into the queue of a backend, or aside while none can serve it."""
        self.void_promise(request, Voided.MOVED)
        self.place(request, self.pick_backend(request))

    def move(self, request: Request, backend: Backend) -> None:
        """Queue a waiting request at a backend that can send it at once: sooner than it was promised where it was."""
        self.taken_over = backend, request.id
        self.arrived_for(request)
        self.dequeue(request)
        self.enqueue(request, backend)

    def pick_backend(self, request: Request) -> Backend | None:
        """Ask the routing policy; None while no backend that can serve the request is up."""
        takers = eligibility.takers_of(self.state, request.version, request.view, request.only)
        if len(takers) > 1 and request.losses:
            takers = tuple(taker for taker in takers if taker not in request.losses) or takers
        if not takers:
            return None
        choice = self.state.routing.pick(request.view, Offers(self.state, request.version, takers), self.now_ns)
        return self.state.backends[choice.backend]

    def place(self, request: Request, backend: Backend | None) -> None:
        """Queue a request at a backend, or keep it aside for want of one."""
        if backend is None:
            self._set_aside(request)
        else:
            self.enqueue(request, backend)

    def _set_aside(self, request: Request) -> None:
        """Keep a request that no backend can take at the moment: nothing bounds how long that lasts."""
        self.void_promise(request, Voided.NO_BACKEND)
        request.backend = None
        self.state.unrouted[request.id] = None
        self._count_waiting(request, 1)

    def _count_waiting(self, request: Request, sign: int) -> None:
        state, tenant = self.state, request.view.tenant
        state.waiting.count(request, sign)
        of_tenant = state.tenant_queued.setdefault(tenant, Queued())
        of_tenant.count(request, sign)
        if not of_tenant.requests:
            del state.tenant_queued[tenant]

    def enqueue(self, request: Request, backend: Backend) -> None:
        self._count_waiting(request, 1)
        request.backend = backend.id
        backend.queued[request.id] = None
        backend.queued_by_version.setdefault(request.version, Line()).add(request.id)
        backend.recount(request.version)
        if not request.counted:
            self._count_outstanding(request, backend)
        backend.ordering.queued(request.view, request.promise, self.now_ns)
        if request.version != BASE:
            key = self.state.packed_for(request.version, backend).key
            self.state.wanted.setdefault(key, Line()).add(request.id)
            if not self.state.store.has(key):
                self.hunger(key)
                if not eligibility.resident(backend, request.version):
                    self.state.lateness.misses(key, self.now_ns)
        self.dirty[backend.id] = None

    def _count_outstanding(self, request: Request, backend: Backend) -> None:
        view = request.view
        request.counted = True
        request.expected_tokens = promising.expected_tokens(self.state, request)
        backend.outstanding.add(
            view.tenant, view.weight, view.input_tokens, request.expected_tokens, view.output_tokens_max
        )

    def no_longer_outstanding(self, request: Request, backend: Backend) -> None:
        view = request.view
        request.counted = False
        backend.outstanding.remove(view.tenant, view.input_tokens, request.expected_tokens, view.output_tokens_max)

    def void_promise(self, request: Request, why: Voided) -> None:
        """Note that what a promise rested on is gone; a request has only one, so nothing bounds its wait any more."""
        if request.promise is not None:
            request.promise = None
            request.voided = why.value
            self.state.voided[why.value] = self.state.voided.get(why.value, 0) + 1

    def void_promises(self, backend: Backend, why: Voided) -> None:
        """Void what is outstanding at a backend: of those that wait, and of those that run and have no token yet."""
        for request_id in backend.queued:
            self.void_promise(self.state.requests[request_id], why)
        for request_id in backend.running:
            request = self.state.requests[request_id]
            if not request.first_token and not request.settled:
                self.void_promise(request, why)

    def dequeue(self, request: Request, to_run: bool = False) -> None:
        """Take a queued request out of wherever it waits."""
        self._count_waiting(request, -1)
        if request.backend is None:
            del self.state.unrouted[request.id]
            return
        backend = self.state.backends[request.backend]
        del backend.queued[request.id]
        line = backend.queued_by_version[request.version]
        line.discard(request.id)
        if not line:
            del backend.queued_by_version[request.version]
            backend.recount(request.version)
        backend.ordering.left(request.id, self.now_ns)
        backend.outstanding.queued_tokens -= request.expected_tokens
        if not to_run:
            self.no_longer_outstanding(request, backend)
        if request.version != BASE:
            self._no_longer_wants(request, self.state.packed_for(request.version, backend).key)
        self.dirty[backend.id] = None

    def _no_longer_wants(self, request: Request, key: str) -> None:
        line = self.state.wanted[key]
        line.discard(request.id)
        if not line:
            del self.state.wanted[key]
            self.state.lateness.ends(key)
        self.hungry = True

    def hunger(self, key: str) -> None:
        """Note that a waiting request needs a blob that the store has not."""
        position = self.state.next_position(key)
        if position is not None:
            heapq.heappush(self.state.hungry_heap, (position, key))
            self.hungry = True

    def went_missing(self, key: str) -> None:
        """Note that a blob, or an engine's copy of it, is gone while requests may wait for it."""
        self.hunger(key)
        if key in self.state.wanted and not self.state.store.has(key) and eligibility.is_needed(self.state, key):
            self.state.lateness.misses(key, self.now_ns)

    def void_if_adapter_is_late(self, request: Request) -> None:
        """Void the promise of a request that has waited for its adapter for longer than the promise allows for that."""
        if request.fetch_ns + self._missing_ns(request) > request.fetch_allowed_ns:
            self.void_promise(request, Voided.ADAPTER_LATE)

    def arrived_for(self, request: Request) -> None:
        """Note how long a request has waited for a blob that has just come."""
        self.void_if_adapter_is_late(request)
        request.fetch_ns += self._missing_ns(request)

    def _missing_ns(self, request: Request) -> int:
        """Return for how long neither the store nor its engine has had a queued request's adapter."""
        if request.backend is None or request.version == BASE:
            return 0
        backend = self.state.backends[request.backend]
        if eligibility.resident(backend, request.version):
            return 0
        key = self.state.packed_for(request.version, backend).key
        return self.state.lateness.waited_ns(key, request.view.arrived_ns, request.queued_clock, self.now_ns)

    def reroute_queue(self, backend: Backend) -> None:
        """Move all that waits at a backend to wherever it can be served now."""
        for request_id in list(backend.queued):
            request = self.state.requests[request_id]
            self.dequeue(request)
            request.backend = None
            self.route_or_refuse(request)

    def route_or_refuse(self, request: Request) -> None:
        """Route a request, or end it when no configured backend can serve it any more."""
        places = eligibility.places_of(self.state, request)
        if any(place.owned for place in places):
            self.route(request)
            return
        self._set_aside(request)
        if places:
            self.drop(request, Reason.NOT_OWNER, eligibility.not_owner_message(places))
            return
        if eligibility.are_gone(self.state, request.only):
            self.drop(request, Reason.NOT_OWNER, eligibility.gone_message(request.only))
            return
        if eligibility.may_come(self.state, request.version, request.only):
            return
        self.drop(
            request,
            Reason.NO_BACKEND,
            eligibility.no_backend_message(self.state, request.view.name or "base model", request.version),
        )

    def route_the_unrouted(self) -> None:
        for request_id in sorted(self.state.unrouted):
            request = self.state.requests[request_id]
            self.dequeue(request)
            self.route_or_refuse(request)

    # Endings.

    def drop(self, request: Request, reason: Reason, message: str, retry_after_ns: int | None = None) -> None:
        """End a request that waits in the queue."""
        self.void_if_adapter_is_late(request)
        self.dequeue(request)
        self.settle(request, reason, message, retry_after_ns=retry_after_ns)
        self.release(request)

    def settle(
        self, request: Request, reason: Reason | None, message: str = "", retry_after_ns: int | None = None
    ) -> None:
        """Give the client its one ending."""
        assert not request.settled, f"request {request.id} was settled already"
        request.settled = True
        dispatched = request.dispatched_ns or self.now_ns
        self.emit(
            Settle(
                request=request.id,
                outcome=outcome_of(reason),
                name=request.view.name,
                tenant=request.view.tenant,
                klass=request.view.klass,
                queue_ns=dispatched - request.view.arrived_ns,
                input_tokens=request.view.input_tokens,
                output_tokens=request.tokens,
                reason=reason,
                message=message,
                backend=request.backend or "",
                version=request.version,
                retry_after_ns=retry_after_ns,
                bound_ns=None if request.promise is None else request.promise.bound_ns,
                voided=request.voided,
            )
        )

    def release(self, request: Request) -> None:
        """Forget a request that has ended here and at its engine."""
        del self.state.requests[request.id]
        if request.version != BASE:
            self.state.versions[request.version].requests -= 1
            self.forget_version_if_unused(request.version)

    # Runs.

    def end_run(self, request: Request, output_tokens: int) -> Backend:
        """Free the seat, the KV and the pins of a run. The request itself is still to be settled or queued again."""
        assert request.backend is not None
        backend = self.state.backends[request.backend]
        del backend.running[request.id]
        backend.more_sequences -= request.view.sequences - 1
        backend.kv_reserved -= request.kv_tokens(backend)
        self.no_longer_outstanding(request, backend)
        request.running = False
        backend.ordering.ended(request.view, output_tokens, self.now_ns)
        if request.version != BASE:
            slot = backend.slots[request.version]
            slot.running -= 1
            if slot.stale and not slot.running:
                backend.close_slot(request.version)  # nothing of it is there any more, and others may wait for the slot
            backend.recount(request.version)
            backend.shadow.ended(request.version)
            self.unpin(request.pinned_key)
            request.pinned_key = ""
        backend.full_until_ns = 0  # what it held may be evicted now
        self.dirty[backend.id] = None
        return backend

    def requeue(self, request: Request) -> None:
        """Queue a request that ran without a token again, under its old place in the order."""
        self.void_promise(request, Voided.RUN_AGAIN)
        request.backend = None
        request.cache = None
        request.first_token = False
        request.dispatched_ns = 0
        self._wait_anew(request)
        self.route_or_refuse(request)

    def _wait_anew(self, request: Request) -> None:
        """Bound the wait of a request whose first bound passed while it ran."""
        if request.expires_ns > self.now_ns:
            return
        limit = self.state.config.classes[request.view.klass]
        request.expires_ns = self.now_ns + limit.queue_wait_ns_max
        if request.deadline_ns is not None:
            request.expires_ns = min(request.expires_ns, request.deadline_ns)
        self.state.set_timer(request.expires_ns, request.id)

    def cancel(self, request: Request, reason: Reason, message: str) -> None:
        """End a request wherever it is. A run keeps its seat until the engine confirms."""
        if not request.running:
            self.drop(request, reason, message)
            return
        assert request.backend is not None
        self.settle(request, reason, message)
        self.emit(CancelRun(request.id, request.attempt, request.backend))

    # The store.

    def unpin(self, key: str) -> None:
        """Give back a pin; "" is the pin of a run that began on a belief alone and had nothing to pin."""
        if not key:
            return
        self.state.store.unpin(key)
        self.hungry = True
        entry = self.state.store.entries[key]
        if entry.doomed and not entry.pins:
            self.drop_blob(key)

    def drop_blob(self, key: str) -> None:
        """Free a blob that nothing uses; if somebody waits for it, it is to be fetched again."""
        if is_files(key):
            self._unloaded(key, self.state.store.entries[key].digest)
        self.state.store.remove(key)
        self.emit(Drop(key))
        self.went_missing(key)
        self.hungry = True

    def _unloaded(self, key: str, version: str) -> None:
        """Believe a version in no engine that reads its files: they go, and it is unloaded where that can be done."""
        for backend in self.state.backends.values():
            if version in backend.shadow.host and self.state.packed_for(version, backend).key == key:
                backend.shadow.forget(version)
                slot = backend.slots.get(version)
                if slot is not None and not backend.slot_in_use(slot):
                    backend.close_slot(version)

    def doom_blob(self, key: str) -> None:
        """Free a blob as soon as its users are done."""
        entry = self.state.store.entries.get(key)
        if entry is None:
            return
        if entry.ready and not entry.pins:
            self.drop_blob(key)
        else:
            entry.doomed = True

    def doom_disk_blob(self, key: str) -> None:
        """Delete a blob from the disk tier as soon as it is neither being written nor read."""
        self.state.disk.entries[key].doomed = True
        self.drop_disk_blob_if_doomed(key)

    def drop_disk_blob_if_doomed(self, key: str) -> None:
        entry = self.state.disk.entries[key]
        if entry.doomed and entry.ready and not entry.pins:
            self.drop_disk_blob(key)

    def drop_disk_blob(self, key: str) -> None:
        self.state.disk.remove(key)
        self.emit(DropDisk(key))

    def forget_version_if_unused(self, digest: str) -> None:
        """Forget a version that no name stands for and no request uses, with its blobs."""
        version = self.state.versions.get(digest)
        if version is None or version.names or version.requests or version.loads:
            return
        for key, entry in list(self.state.store.entries.items()):
            if entry.digest == digest:
                self.doom_blob(key)
        for key, entry in list(self.state.disk.entries.items()):
            if entry.digest == digest:
                self.doom_disk_blob(key)
        self.state.forget_derived(digest=digest)
        self.state.suspects.pop(digest, None)
        del self.state.versions[digest]


def outcome_of(reason: Reason | None) -> Outcome:
    """Return the label under which an ending is counted."""
    if reason is None:
        return Outcome.OK
    match reason.row.family:
        case Family.REFUSED:
            return Outcome.REFUSED
        case Family.DROPPED:
            return DROPPED[reason]
        case Family.FAILED | Family.INVALID | Family.MISUSED:
            return Outcome.FAILED


DROPPED = {Reason.EXPIRED: Outcome.EXPIRED, Reason.CANCELLED: Outcome.CANCELLED}
