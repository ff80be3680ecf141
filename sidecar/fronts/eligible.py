"""Which backends a request can go to, by the kind of model that it is written for and by the model that it names.

A pool may have several kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from sidecar.backends.api import Payload
from sidecar.backends.kind import Native
from sidecar.backends.registry import model_kind
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Reason, Refused


def backends_of(state: State, kinds: Collection[str]) -> tuple[str, ...] | None:
    """Return the backends of some kinds, () for any where there are no others; None where there are others only."""
    return places(state, lambda facts: facts.kind in kinds)


def places(state: State, fits: Callable[[EngineFacts], bool]) -> tuple[str, ...] | None:
    """Return the backends whose engines fit, () for any where all do; None where none does.

    Backends that were found are named by their pool if all in it fit, so that one that comes later is meant too. What a
    pool is declared to have counts where it is empty at the moment.
    """
    engines = [(backend.group, backend.id, fits(backend.facts)) for backend in state.backends.values()]
    engines += [(pool, pool, fits(facts)) for pool, facts in empty_pools(state)]
    unfit = {group for group, _, fit in engines if not fit}
    if not unfit:
        return ()
    found = dict.fromkeys(identity if group in unfit else group for group, identity, fit in engines if fit)
    return tuple(found) or None


def named(state: State, backends: Collection[str]) -> tuple[str, ...]:
    """Return backends as a request is held to them, () for any if all are meant: a pool where all in it are.

    A pool that is empty at the moment is one of `backends` itself.
    """
    groups = {backend.id: backend.group for backend in state.backends.values()}
    groups |= {pool: pool for pool, _ in empty_pools(state)}
    left_out = {group for identity, group in groups.items() if identity not in backends}
    if not left_out:
        return ()
    return tuple(dict.fromkeys(one if groups[one] in left_out else groups[one] for one in backends))


def empty_pools(state: State) -> list[tuple[str, EngineFacts]]:
    """Return the pools in which there is no engine at the moment, with what is declared of those that will come."""
    filled = {backend.pool for backend in state.backends.values()}
    return [(pool, facts) for pool, facts in state.config.pools.items() if pool not in filled]


def as_it_is(state: State, payload: Payload) -> tuple[Payload, tuple[str, ...]]:
    """Return a KServe client's own request and the backends that it is held to, () for any.

    Where all backends are of one kind it goes there whatever it looks like: what is wrong with it is the engine's to
    say, an unknown model's name too. Raises Refused(INVALID_REQUEST) where nobody speaks KServe.
    """
    engines = _engines(state)
    kserve = [facts for facts in engines if model_kind(facts.kind).native is Native.KSERVE]
    if engines and not kserve:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"no backend speaks KServe: these are {_titles(engines)}; use the OpenAI API on the http listener, or "
            "Gateway.Generate",
        )
    is_named = any(payload.model in facts.models for facts in kserve)

    def has_model(facts: EngineFacts) -> bool:
        """One that names no models may have any, but not where others name it."""
        return payload.model in facts.models if is_named else not facts.models

    having = [facts for facts in kserve if has_model(facts)]
    kinds = {facts.kind for facts in having or kserve}
    if len(kinds) == 1:
        payload = replace(payload, kind=kinds.pop())

    def fits(facts: EngineFacts) -> bool:
        return facts.kind in payload.kinds and (not having or has_model(facts))

    return payload, places(state, fits) or ()


def _engines(state: State) -> list[EngineFacts]:
    """Return what is known of all engines, and what is declared of those that have not been found yet."""
    return [*(backend.facts for backend in state.backends.values()), *(facts for _, facts in empty_pools(state))]


def base_names(facts: EngineFacts) -> tuple[str, ...]:
    """Return what clients may call an engine's base model: its own names, and what an OpenAI server serves it as."""
    return (*facts.base_models, *(facts.models if model_kind(facts.kind).native is Native.OPENAI else ()))


def _titles(engines: Iterable[EngineFacts]) -> str:
    return ", ".join(dict.fromkeys(model_kind(facts.kind).title for facts in engines))
