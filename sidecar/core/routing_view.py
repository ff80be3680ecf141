"""The view that a routing policy gets: the backends that can serve a request, each computed only when read."""

from __future__ import annotations

from collections.abc import Iterator

from policies.views import BASE, Candidate
from sidecar.core import eligibility
from sidecar.core.promising import pace_is_known, pace_of
from sidecar.core.state import Backend, State

USUAL_TOKENS = 1024
"""The context length of a typical request, by which engines are compared."""


class RoutingView:
    """The candidates of one request; implements `policies.views.Candidates`."""

    __slots__ = ("_state", "_version", "backends")

    def __init__(self, state: State, version: str, backends: tuple[str, ...]) -> None:
        self._state = state
        self._version = version
        self.backends = backends

    @property
    def in_flight(self) -> int:
        return len(self._state.requests)

    @property
    def rank(self) -> int:
        return 0 if self._version == BASE else self._state.versions[self._version].adapter.rank_max

    def __getitem__(self, backend: str) -> Candidate:
        if backend not in self.backends:
            raise KeyError(backend)
        return candidate(self._state, self._state.backends[backend], self._version)

    def in_flights(self) -> list[int]:
        offered = [self._state.backends[each] for each in self.backends]
        return [len(one.running) + one.more_sequences + len(one.loads) + len(one.queued) for one in offered]

    def residents(self) -> list[str]:
        every, version, known = self._state.backends, self._version, self._state.versions.get(self._version)
        if known is None:
            return list(self.backends)  # the base model
        near = {*self._state.where.held.get(version, ()), *known.loads}
        return [each for each in self.backends if each in near and _is_resident(every[each], version)] if near else []

    def __iter__(self) -> Iterator[Candidate]:
        backends = self._state.backends
        return (candidate(self._state, backends[backend], self._version) for backend in self.backends)

    def __len__(self) -> int:
        return len(self.backends)


def candidate(state: State, backend: Backend, version: str) -> Candidate:
    """Return the view of one backend for a routing policy."""
    slot = backend.slots.get(version)
    pages = state.packed_for(version, backend).pages
    slots, slots_free = _slots(backend, pages)
    return Candidate(
        backend=backend.id,
        resident=_is_resident(backend, version),
        open=slot is not None,
        awaited=slot is not None or version in backend.queued_by_version,
        held=len(backend.shadow.host.held),
        running=backend.in_flight,
        queued=len(backend.queued),
        seats=backend.seats(state.config),
        slots=slots,
        slots_free=slots_free,
        pages=pages,
        work_tokens=backend.outstanding.expected_tokens,
        tokens_per_s=_tokens_per_s(state, backend),
    )


def _is_resident(backend: Backend, version: str) -> bool:
    if eligibility.resident(backend, version):
        return True
    slot = backend.slots.get(version)
    return slot is not None and slot.load is not None


def _slots(backend: Backend, pages: int) -> tuple[int | None, int | None]:
    """Return how many versions of this size may be open, and how many more; None for both while being learned."""
    if not pages or (backend.facts.device_pages is None and backend.pages_learned is None):
        return None, None
    limit = eligibility.page_limit(backend)
    return limit // pages, max(0, (limit - backend.busy_pages) // pages)


def _tokens_per_s(state: State, backend: Backend) -> float:
    """Return the expected output of a full batch of typical requests, in tokens/s; 0 while the pace is a guess."""
    if not pace_is_known(backend):
        return 0.0
    batch, kv_tokens = backend.facts.seats or state.config.seats_default, backend.facts.kv_tokens
    if kv_tokens is not None:
        batch = max(1, min(batch, kv_tokens // USUAL_TOKENS))
    return batch * 1e9 / (pace_of(backend).step_ns(batch, batch * USUAL_TOKENS) * backend.slowness)
