"""Check whether an adapter can be served here at all, before it is registered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidecar.adapters.base_model import BaseModel, unlike
from sidecar.adapters.names import shown
from sidecar.backends.registry import base_names, is_base_model
from sidecar.core import events as ev
from sidecar.core.effects import Effect
from sidecar.core.facts import Adapter
from sidecar.core.layout import packed_size_bytes
from sidecar.core.misfits import misfit
from sidecar.core.state import State
from sidecar.errors import Invalid, Reason
from sidecar.telling.misfits import sentence

logger = logging.getLogger(__name__)


def check_fit(name: str, adapter: Adapter, state: State, bases: Mapping[str, BaseModel]) -> None:
    """Raise Invalid if it has a base model's name, or does not fit its base model, the store or any backend.

    As far as these are known: an engine that comes later may tell another name of its base model (`SharedNames`).
    """
    if is_base_model(state, name):
        raise Invalid(
            Reason.INVALID_NAME,
            f"adapter name {shown(name)} is not valid: a base model that is served here has this name, and requests "
            "for it would get the adapter; choose another",
        )
    _fits_its_base(name, adapter, bases)
    _fits_the_store(name, adapter, state)
    _fits_a_backend(name, adapter, state)


def _fits_its_base(name: str, adapter: Adapter, bases: Mapping[str, BaseModel]) -> None:
    base = bases.get(adapter.base_model)
    wrong = None if base is None else unlike(adapter, base)
    if wrong is not None:
        raise Invalid(Reason.ADAPTER_MISMATCH, f"{name}: {wrong}", adapter=name)


def _fits_the_store(name: str, adapter: Adapter, state: State) -> None:
    budget = state.config.store_bytes
    layouts = [backend.facts.layout for backend in state.backends.values()]
    sizes = [packed_size_bytes(adapter.rows, layout) for layout in layouts]
    if sizes and min(sizes) > budget:
        raise Invalid(
            Reason.ADAPTER_TOO_LARGE,
            f"{name}: packed it takes {min(sizes)} bytes and the host store holds {budget}; raise store.memory_bytes",
            adapter=name,
        )


def _fits_a_backend(name: str, adapter: Adapter, state: State) -> None:
    """Refuse what no configured backend can serve, before it is sent to an engine."""
    unfit = [misfit(adapter, backend.facts) for backend in state.backends.values()]
    if unfit and all(unfit):
        first, backend = unfit[0], next(iter(state.backends))
        assert first is not None
        raise Invalid(
            Reason.ADAPTER_MISMATCH, f"{name}: no backend can serve it. {backend}: {sentence(first)}", adapter=name
        )


class SharedNames:
    """An observer that warns, once for each name, of an adapter and a base model that share it.

    A registration of such a name is refused, so the adapter was there first: requests for it go on to get the adapter.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._told: set[str] = set()

    def observed(self, event: ev.Event, effects: Sequence[Effect], now_ns: int) -> None:
        find = _NAMES.get(type(event))
        for name in () if find is None else find(self._state, event):
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "%s is an adapter and also the name of a base model that is served here: requests for it get the "
                    "adapter; register the adapter under another name, then unregister this one",
                    name,
                )


def _of_backend(state: State, event: ev.BackendAdded | ev.BackendUp) -> list[str]:
    known = state.backends.get(event.backend)
    return [] if known is None else [name for name in base_names(known.facts) if name in state.names]


def _of_adapter(state: State, event: ev.AdapterRegistered) -> list[str]:
    return [event.name] if is_base_model(state, event.name) else []


def _of_pools(state: State, event: ev.ConfigChanged) -> list[str]:
    return [name for facts in state.config.pools.values() for name in base_names(facts) if name in state.names]


_NAMES: Mapping[type, Callable[[State, Any], list[str]]] = {
    ev.BackendAdded: _of_backend,
    ev.BackendUp: _of_backend,
    ev.AdapterRegistered: _of_adapter,
    ev.ConfigChanged: _of_pools,
}
