"""Tell the meter of usage what the core's steps mean: who runs where, and which versions are in which engine.

What is in an engine is what the core believes: the versions on the GPU. They are compared with those known only after
steps that can change them, so that a step of a running request costs no more than a look into a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from policies.views import BASE as BASE_VERSION
from sidecar.access.usage.keeper import UsageKeeper
from sidecar.access.usage.meter import BASE, NOBODY, UNKNOWN, Key, tenant_shown
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.core import Core
from sidecar.core.enums import Phase
from sidecar.core.facts import version_of_key
from sidecar.core.state import Backend
from sidecar.errors import Reason
from sidecar.model.reference import Reference
from sidecar.shell.driver import goes_on
from sidecar.telling.naming import names_of


class UsageObserver:
    """An observer of the core's steps, and of the requests that are refused before."""

    def __init__(
        self,
        core: Core,
        keeper: UsageKeeper,
        estimated: Collection[int] = (),
        counted: Callable[[int], int | None] = lambda request: None,
    ) -> None:
        """`estimated` has, until they are settled, the requests whose prompts nothing had counted before they ran.

        `counted` returns the engine's own count of a request's prompt, None if there is none.
        """
        self._state = core.state
        self._estimated = estimated
        self._counted = counted
        self._keeper = keeper
        self._meter = keeper.meter
        self._keys: dict[int, Key] = {}
        """The rows of the requests that were sent to an engine and have not been settled."""
        self._held: dict[str, set[str]] = {}
        """The versions known to be on each backend."""
        self._loads: dict[int, tuple[Key, int]] = {}

    def observed(self, event: ev.Event, effects: Sequence[do.Effect], now_ns: int) -> None:
        keeper = self._keeper
        if now_ns >= keeper.until_ns:
            keeper.turn(now_ns)
        take = _EVENTS.get(type(event))
        if take is not None:
            take(self, event, now_ns)
        for effect in effects:
            if isinstance(effect, do.Settle):
                self._settle(effect, goes_on(event, effect))
            note = _EFFECTS.get(type(effect))
            if note is not None:
                note(self, effect, now_ns)
        if now_ns > keeper.last_ns:  # endings that the core did not make come with the time of its last step
            keeper.last_ns = now_ns

    # Events.

    def _run_over(self, event: ev.RunEnded | ev.RunFailed, now_ns: int) -> None:
        self._meter.ended((event.request, event.attempt), now_ns)

    def _run_failed(self, event: ev.RunFailed, now_ns: int) -> None:
        key = self._keys.get(event.request)
        self._run_over(event, now_ns)
        if key is not None:
            self._look(key[3], now_ns)

    def _load_done(self, event: ev.LoadDone, now_ns: int) -> None:
        load = self._loads.pop(event.load, None)
        if load is not None:
            self._meter.loaded(*load)
            self._look(load[0][3], now_ns)

    def _load_failed(self, event: ev.LoadFailed, now_ns: int) -> None:
        load = self._loads.pop(event.load, None)
        if load is not None:
            self._look(load[0][3], now_ns)

    def _backend_changed(self, event: Any, now_ns: int) -> None:
        self._look(event.backend, now_ns)

    def _backend_lost(self, event: ev.BackendLost | ev.BackendRemoved, now_ns: int) -> None:
        """End its runs and loads, which end with it without events of their own."""
        self._meter.lost(event.backend, now_ns)
        self._loads = {load: known for load, known in self._loads.items() if known[0][3] != event.backend}
        self._look(event.backend, now_ns)

    def _fetched(self, event: ev.Fetched, now_ns: int) -> None:
        entry = self._state.store.entries.get(event.key)
        if entry is not None and entry.ready:
            nobody = (NOBODY, *self._label(version_of_key(event.key)), "")
            self._meter.stored(event.key, entry.size_bytes, nobody, now_ns)

    # Effects.

    def _load(self, effect: do.Load, now_ns: int) -> None:
        self._loads[effect.load] = (
            self._cause(effect.backend, version_of_key(effect.packed.key)),
            effect.packed.size_bytes,
        )

    def _cause(self, backend: str, version: str) -> Key:
        """Return the row of the first request that waits for a version at a backend; nobody's if none does."""
        queue = self._state.backends[backend].queued_by_version.get(version)
        head = None if queue is None else queue.head()
        if head is None:
            return (NOBODY, *self._label(version, backend), backend)
        request = self._state.requests[head]
        return (tenant_shown(request.view.tenant), request.view.name, f"v{request.ordinal}", backend)

    def _dispatch(self, effect: do.Dispatch, now_ns: int) -> None:
        request = self._state.requests[effect.request]
        view, backend, version = request.view, effect.backend, request.version
        stays: tuple[Hashable, ...] = ()
        if version == BASE_VERSION:
            key = (tenant_shown(view.tenant), BASE, "", backend)
        else:
            key = (tenant_shown(view.tenant), view.name, f"v{effect.ordinal}", backend)
            stays = ((backend, version), effect.packed_key)
            if version not in self._held.get(backend, ()):
                self._look(backend, now_ns)
        self._keys[effect.request] = key
        self._meter.began((effect.request, effect.attempt), key, view.sequences, stays, now_ns)

    def _settle(self, effect: do.Settle, goes_on: bool) -> None:
        key = self._keys.pop(effect.request, None)
        if goes_on or effect.reason is Reason.UNAUTHENTICATED:  # then it is nobody's
            return
        is_sent = key is not None or effect.output_tokens > 0  # the owner to which it was passed on may be lost
        if key is None:
            named = self._named(effect.name, effect.version) if effect.request or not effect.name else (UNKNOWN, "")
            key = (tenant_shown(effect.tenant), *named, effect.backend if is_sent else "")
        counted = self._counted(effect.request)
        are_estimated = counted is None and effect.request in self._estimated, effect.is_estimated
        inputs = effect.input_tokens if counted is None else counted
        tokens = (inputs, effect.output_tokens) if is_sent else (0, 0)
        self._meter.settled(key, effect.outcome.value, tokens, are_estimated)

    def _drop(self, effect: do.Drop, now_ns: int) -> None:
        self._meter.gone(effect.key, now_ns)
        version = version_of_key(effect.key)
        # An engine that reads files loses a version with its files; with its last one it leaves `_held`.
        for backend in [backend for backend, held in self._held.items() if version in held]:
            self._look(backend, now_ns)

    # Names.

    def _label(self, version: str, backend: str = "") -> tuple[str, str]:
        """Return a version's adapter and ordinal, by what people call it now; "a = b" has several ordinals."""
        names = names_of(self._state, version, self._state.backends.get(backend))
        if not names:
            return UNKNOWN, version[:12]
        ordinals = dict.fromkeys(self._named(name, version)[1] for name in names)
        return " = ".join(names), " = ".join(ordinals)

    def _named(self, name: str, version: str) -> tuple[str, str]:
        """Return the adapter and version of a request that was not sent. Clients may name anything."""
        if not name:
            return BASE, ""
        known = self._state.names.get(Reference.of(name).name)
        if known is None:
            return UNKNOWN, ""
        ordinal = max((number for number, held in known.versions.items() if held == version), default=None)
        return known.name, "" if ordinal is None else f"v{ordinal}"

    # Engines.

    def _look(self, backend_id: str, now_ns: int) -> None:
        """Compare what a backend has and holds with what is known of it."""
        backend = self._state.backends.get(backend_id)
        is_ours = backend is not None and backend.phase is Phase.UP and backend.owned
        held = self._held.setdefault(backend_id, set())
        now: dict[str, int] = {}
        if backend is not None and is_ours:
            seats, slots, now = self._has(backend)
            self._meter.engine(backend_id, seats, slots, True, now_ns)
        else:
            self._meter.engine(backend_id, 0, 0, False, now_ns)
        for version in [version for version in held if version not in now]:
            held.remove(version)
            self._meter.gone((backend_id, version), now_ns)
        for version, pages in now.items():
            if version not in held:
                held.add(version)
                nobody = (NOBODY, *self._label(version, backend_id), backend_id)
                self._meter.came((backend_id, version), backend_id, pages, nobody, now_ns)
        if not held:
            del self._held[backend_id]

    def _has(self, backend: Backend) -> tuple[int, int, dict[str, int]]:
        """Return a backend's seats and slots, and the slots of each version there; none where they are unknown."""
        seats, slots = backend.seats_at_best(self._state.config), backend.facts.device_pages
        if slots is None:
            return seats, 0, {}
        return seats, slots, {version: known.pages for version, known in backend.shadow.device.held.items()}


_EVENTS: dict[type, Callable[[UsageObserver, Any, int], None]] = {
    ev.RunEnded: UsageObserver._run_over,
    ev.RunFailed: UsageObserver._run_failed,
    ev.LoadDone: UsageObserver._load_done,
    ev.LoadFailed: UsageObserver._load_failed,
    ev.Fetched: UsageObserver._fetched,
    ev.BackendUp: UsageObserver._backend_changed,
    ev.BackendMeasured: UsageObserver._backend_changed,
    ev.BackendTaken: UsageObserver._backend_changed,
    ev.BackendGivenUp: UsageObserver._backend_changed,
    ev.BackendLost: UsageObserver._backend_lost,
    ev.BackendRemoved: UsageObserver._backend_lost,
}
_EFFECTS: dict[type, Callable[[UsageObserver, Any, int], None]] = {
    do.Load: UsageObserver._load,
    do.Dispatch: UsageObserver._dispatch,
    do.Drop: UsageObserver._drop,
}
