"""The view of a backend that an ordering policy gets: live, and computed only when read."""

from __future__ import annotations

from collections.abc import Mapping

from policies.views import BASE
from sidecar.core import eligibility
from sidecar.core.state import Backend, Slot, State


class LiveOrderingView:
    """One backend between two decisions; implements `policies.views.OrderingView`."""

    __slots__ = ("_backend", "_now_ns", "_pages", "_state", "open", "seats")

    def __init__(self, state: State, backend: Backend, now_ns: int) -> None:
        self._state = state
        self._backend = backend
        self.open: Mapping[str, Slot] = backend.slots
        self.seats = backend.seats(state.config)  # no decision changes it
        self._now_ns = now_ns
        self._pages: eligibility.PageRoom | None = None

    @property
    def backend(self) -> str:
        return self._backend.id

    @property
    def seats_free(self) -> int:
        return self.seats - self._backend.in_flight

    @property
    def pages_free(self) -> int | None:
        return self._page_room.free

    def is_ready(self, version: str) -> bool:
        state, backend = self._state, self._backend
        if version == BASE or eligibility.resident(backend, version):
            return True
        if eligibility.on_probation_elsewhere(state, backend, state.versions[version]):
            return False
        if eligibility.ready(state, backend, version):
            return True
        return not eligibility.awaits_fetch(state, state.packed_for(version, backend).key)

    def can_open(self, version: str) -> bool:
        return (
            version not in self._backend.slots
            and eligibility.ready(self._state, self._backend, version)
            and eligibility.why_not_open(self._state, self._backend, version, self._now_ns, self._page_room) is None
        )

    def can_send(self, request_id: int) -> bool:
        request = self._state.requests[request_id]
        return eligibility.why_not_send(self._state, self._backend, request, self._now_ns) is None

    def changed(self) -> None:
        """Drop cached counts after a decision was carried out."""
        self._pages = None

    @property
    def _page_room(self) -> eligibility.PageRoom:
        if self._pages is None:
            self._pages = eligibility.page_room(self._backend)
        return self._pages
