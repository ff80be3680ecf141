"""Requests of operators: register, pin, evict, prefetch, release, drain, change the configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sidecar.core import eligibility, queueing, storing, suspects
from sidecar.core.config import FIXED
from sidecar.core.effects import Answer
from sidecar.core.enums import Fate, Tier, Voided
from sidecar.core.events import (
    AdapterRegistered,
    AdapterUnregistered,
    ConfigChanged,
    DrainSet,
    EvictAsked,
    PrefetchAsked,
    ReleaseAsked,
)
from sidecar.core.facts import NamedVersion, version_id
from sidecar.core.misfits import Placed
from sidecar.core.state import Backend, Name, State, Version
from sidecar.core.step import Step


def registered(step: Step, event: AdapterRegistered) -> None:
    """Handle AdapterRegistered: redefine a name. Queued and running requests keep their version."""
    state = step.state
    versions = {version.ordinal: _version(state, event.name, version) for version in event.versions}
    before = state.names.get(event.name)
    name = state.names[event.name] = Name(**event.defined(), versions=versions, kept=event.kept)
    if before is not None:
        _refresh_queued(step, before, name)
        _unname(step, event.name, [v for v in before.versions.values() if v not in versions.values()])
    for version in dict.fromkeys(versions.values()):
        if state.operator_holds(version):
            _hold(step, version)
        else:
            _let_go_unless_held(state, version)
    step.hungry = True  # what is no longer kept may make space for waiting requests


def _version(state: State, name: str, version: NamedVersion) -> str:
    """Add a version to a name and return its id."""
    identity = version_id(version.adapter.digest, version.generation)
    if identity not in state.versions:
        state.versions[identity] = Version(version.adapter, version.origin, version.generation)
    state.versions[identity].origin = version.origin  # the latest origin is the likeliest to still exist
    state.versions[identity].names[name] = None
    return identity


def _refresh_queued(step: Step, before: Name, now: Name) -> None:
    """Move queued requests to the fresh copy of their version after a refresh: the old copy is under suspicion."""
    fresh = {
        old: new
        for ordinal, old in before.versions.items()
        if (new := now.versions.get(ordinal)) is not None and new != old
        if step.state.versions[new].adapter.digest == step.state.versions[old].adapter.digest
    }
    for request in list(step.state.requests.values()) if fresh else ():
        new = fresh.get(request.version)
        if new is None or request.running or request.settled or request.view.name != now.name:
            continue
        queueing.dequeue(step, request)
        step.state.versions[request.version].requests -= 1
        step.state.versions[new].requests += 1
        request.take_version(new)
        queueing.route_or_refuse(step, request)


def unregistered(step: Step, event: AdapterUnregistered) -> None:
    """Handle AdapterUnregistered: forget a name. Its queued and running requests are served before its weights go."""
    name = step.state.names.pop(event.name, None)
    if name is not None:
        _unname(step, name.name, list(name.versions.values()))


def _unname(step: Step, name: str, versions: list[str]) -> None:
    for version in dict.fromkeys(versions):
        step.state.versions[version].names.pop(name, None)
        _let_go_unless_held(step.state, version)
        storing.forget_version_if_unused(step, version)


def _hold(step: Step, digest: str) -> None:
    """Keep a version's blobs in the tiers that its names require, and fetch a missing pinned one."""
    _mark_held(step.state, digest)
    if step.state.memory_holds(digest):
        want(step, digest, [b for b in eligibility.servers_of(step.state, digest) if b.takes_requests])


def _let_go_unless_held(state: State, digest: str) -> None:
    if digest in state.versions:
        _mark_held(state, digest)


def _mark_held(state: State, digest: str) -> None:
    for store, held in ((state.store, state.memory_holds(digest)), (state.disk, state.operator_holds(digest))):
        for key in store.keys_of(digest):
            store.entries[key].held_by_operator = held


def want(step: Step, digest: str, backends: list[Backend]) -> None:
    """Prefetch a version in the layouts of some backends. It takes nothing that a waiting request needs."""
    for backend in backends:
        key = step.state.packed_for(digest, backend).key
        if key not in step.state.store.entries:
            step.state.prefetches[key] = (digest, backend.id)
    step.hungry = True


def want_all_pinned(step: Step, backend: Backend) -> None:
    """Prefetch pinned adapters for a backend that has just come up or was just taken over."""
    for name in step.state.names.values():
        if name.pinned and eligibility.cannot_serve(step.state, backend, name.digest) is None:
            want(step, name.digest, [backend])


def evict_asked(step: Step, event: EvictAsked) -> None:
    """Handle EvictAsked: drop an adapter's blobs now, and answer place by place what became of them."""
    state = step.state
    digest = state.names[event.name].digest
    before = holders_of(state, (digest,))
    for key in state.store.keys_of(digest):
        state.store.entries[key].held_by_operator = False
        storing.doom_blob(step, key)
    for key in state.disk.keys_of(digest):
        storing.doom_disk_blob(step, key)
    places = []
    for place, held in before.items():
        is_pinned = place is Tier.MEMORY and state.memory_holds(digest)
        left = replace(left_at(state, place, digest), is_pinned=is_pinned) if held else _at(place, Fate.ABSENT)
        places.append(left)
    step.emit(Answer(event.ask, tuple(places)))


def _at(place: Tier | str, fate: Fate, **more: Any) -> Placed:
    return Placed(fate, place, **more) if isinstance(place, Tier) else Placed(fate, backend=place, **more)


def holders_of(state: State, versions: Collection[str]) -> dict[Tier | str, list[str]]:
    """Return which of some versions are at each place: in memory, on disk if that is used, in each engine."""
    tiers = {Tier.MEMORY: state.store} | ({Tier.DISK: state.disk} if state.disk.budget_bytes else {})
    found: dict[Tier | str, list[str]] = {
        tier: [version for version in versions if store.keys_of(version)] for tier, store in tiers.items()
    }
    for backend in state.backends.values():
        found[backend.id] = [version for version in versions if eligibility.resident(backend, version)]
    return found


def left_at(state: State, place: Tier | str, version: str) -> Placed:
    """Return what becomes of a version that was at a place and is to go from there."""
    tier = state.disk if place is Tier.DISK else state.store
    fate = Fate.IN_USE if tier.keys_of(version) else Fate.GONE
    if isinstance(place, Tier):
        return _at(place, fate)
    unloads = state.backends[place].facts.unloads
    if unloads in ("", "nothing"):
        return _at(place, Fate.NOT_UNLOADED)
    return _at(place, fate, lingers=unloads == "name")


def gone_from(state: State, before: Mapping[Tier | str, Collection[str]]) -> Iterator[Placed]:
    """Yield what became of the versions of a name that has been forgotten, by the places where they were."""
    for place, versions in before.items():
        if isinstance(place, Tier) or place in state.backends:
            for version in versions:
                names = tuple(state.versions[version].names) if version in state.versions else ()
                yield _at(place, Fate.SHARED, names=names) if names else left_at(state, place, version)


def prefetch_asked(step: Step, event: PrefetchAsked) -> None:
    """Handle PrefetchAsked: bring an adapter into the store for every layout in use, and into the named backends."""
    state = step.state
    digest = state.names[event.name].digest
    places = []
    servers = {backend.id: backend for backend in eligibility.servers_of(state, digest)}
    for backend_id in event.backends or tuple(servers):
        backend = servers.get(backend_id)
        if backend_id not in state.backends or (backend is not None and backend.leaving):
            places.append(_at(backend_id, Fate.LEAVING))
        elif backend is None:
            unfit = eligibility.cannot_serve(state, state.backends[backend_id], digest)
            places.append(_at(backend_id, Fate.UNFIT, misfit=unfit))
        elif eligibility.resident(backend, digest):
            places.append(_at(backend_id, Fate.RESIDENT))
        else:
            want(step, digest, [backend])
            if event.backends:
                backend.warmups[digest] = None
                step.dirty[backend_id] = None
            held = state.store.has(state.packed_for(digest, backend).key)
            places.append(_at(backend_id, Fate.HELD if held else Fate.FETCHING))
    step.emit(Answer(event.ask, tuple(places)))


def release_asked(step: Step, event: ReleaseAsked) -> None:
    """Handle ReleaseAsked: put a name's versions back on probation, and forget every backend's refusal of them.

    All its versions: a quarantined one may have been rolled back meanwhile.
    """
    for digest in step.state.names[event.name].versions.values():
        version = step.state.versions[digest]
        version.quarantined = None
        version.refused_by.clear()
        step.state.forget_servers_of(digest)
        suspects.clear(step.state, digest)


def drain_set(step: Step, event: DrainSet) -> None:
    """Handle DrainSet: stop or resume sending to a backend. Its queue is rerouted; its runs finish."""
    backend = step.state.backends[event.backend]
    if backend.draining == event.draining:
        return
    backend.draining = event.draining
    step.state.forget_servers()
    if event.draining:
        queueing.reroute_queue(step, backend)
    queueing.route_unrouted(step)


def config_changed(step: Step, event: ConfigChanged) -> None:
    """Handle ConfigChanged. A request that is here keeps the longest wait and the promise that it was admitted with;
    a promise is void only where tenants' weights change the shares on which it rests.
    """
    state = step.state
    before, state.config = state.config, event.config
    assert all(getattr(before, name) == getattr(event.config, name) for name in FIXED), "a fixed setting has changed"
    for backend in state.backends.values():
        if backend.outstanding.reweigh(event.config.weight_of):
            queueing.void_promises(step, backend, Voided.SHARES_CHANGED)
    if before.pools != event.config.pools:
        state.forget_servers()
        queueing.route_unrouted(step)
    step.hungry = True  # what may be fetched ahead may have grown
