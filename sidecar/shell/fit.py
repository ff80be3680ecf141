"""Check whether an adapter can be served here at all, before it is registered."""

from __future__ import annotations

from collections.abc import Mapping

from sidecar.adapters.base_model import BaseModel, unlike
from sidecar.core.facts import Adapter, misfit
from sidecar.core.layout import packed_size_bytes
from sidecar.core.state import State
from sidecar.errors import Invalid, Reason


def check_fit(name: str, adapter: Adapter, state: State, bases: Mapping[str, BaseModel]) -> None:
    """Raise Invalid if it does not fit its base model, the store or any backend, as far as these are known."""
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
            Reason.ADAPTER_MISMATCH, f"{name}: no backend can serve it. {backend}: {first.sentence}", adapter=name
        )
