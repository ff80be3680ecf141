"""Choose the backends that a request may go to, by the kind of model and the model's name that it is written for.

A pool may have engines of several kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from sidecar.backends.api import Payload
from sidecar.backends.kind import Native
from sidecar.backends.openai.paths import generates
from sidecar.backends.registry import base_names, is_base_model, model_kind
from sidecar.config.identities import clipped
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Reason, Refused
from sidecar.model.reference import BASE_NAMES, Reference

SORTS_MAX = 1_000
"""Sorts of requests that are kept: clients choose the names of models."""


IdRange = Callable[[], tuple[float, float] | None]
"""Returns the least and the largest token id of a prompt; None if it has none."""


def foreign_id(facts: EngineFacts, id_range: IdRange) -> str:
    """Return why an engine must not get a prompt's token ids; "" if it may."""
    if facts.vocabulary is None:
        return ""
    strange = next((each for each in id_range() or () if not 0 <= each < facts.vocabulary), None)
    if strange is None:
        return ""
    return f"the token id {strange} is none of the model's, which are 0 to {facts.vocabulary - 1}"


def backends_of(
    state: State, kinds: Collection[str], base: str = "", id_range: IdRange = lambda: None
) -> tuple[str, ...] | None:
    """Return the backends of these kinds that may get a prompt's token ids: () for all backends, None for none.

    With `base` they are those of that base model.
    """

    def fits(facts: EngineFacts) -> bool:
        may_get = generates(facts.paths) and not foreign_id(facts, id_range)
        return facts.kind in kinds and may_get and has_base(facts, base)

    return fitting_backends(state, fits)


def is_base(state: State, name: str) -> bool:
    """Return True if a name means a base model."""
    if Reference.of(name).name in state.names:
        return False
    return name in BASE_NAMES or is_base_model(state, name)


def has_base(facts: EngineFacts, base: str) -> bool:
    """Return True if an engine's base model has a name; each has "" and "base"."""
    return base in BASE_NAMES or base in base_names(facts)


def fitting_backends(state: State, fits: Callable[[EngineFacts], bool]) -> tuple[str, ...] | None:
    """Return the backends whose engines fit: () if all do, None if none does.

    A discovered backend is named by its pool if all in the pool fit, so that later members are included. An empty pool
    counts with the facts that its configuration declares.
    """
    engines = [(backend.group, backend.id, fits(backend.facts)) for backend in state.backends.values()]
    engines += [(pool, pool, fits(facts)) for pool, facts in empty_pools(state)]
    unfit = {group for group, _, fit in engines if not fit}
    if not unfit:
        return ()
    found = dict.fromkeys(identity if group in unfit else group for group, identity, fit in engines if fit)
    return tuple(found) or None


def restriction_to(state: State, backends: Collection[str]) -> tuple[str, ...]:
    """Return these backends as a restriction of a request: () if they are all, and a pool's name for all of a pool.

    An empty pool is represented in `backends` by its own name.
    """
    groups = {backend.id: backend.group for backend in state.backends.values()}
    groups |= {pool: pool for pool, _ in empty_pools(state)}
    left_out = {group for identity, group in groups.items() if identity not in backends}
    if not left_out:
        return ()
    return tuple(dict.fromkeys(one if groups[one] in left_out else groups[one] for one in backends))


def empty_pools(state: State) -> list[tuple[str, EngineFacts]]:
    """Return the pools that have no engine at the moment, each with the declared facts of its engines."""
    filled = {backend.pool for backend in state.backends.values()}
    return [(pool, facts) for pool, facts in state.config.pools.items() if pool not in filled]


def kserve_eligibility(state: State, payload: Payload, base: str = "") -> tuple[Payload, tuple[str, ...]]:
    """Return a KServe client's payload and the backends that it is restricted to, () for any.

    `base` names the base model, "" whichever it is. If all backends are of one kind, the payload goes there unchecked:
    the engine reports what is wrong with it, an unknown model included.

    Raises Refused(INVALID_REQUEST) if no backend speaks KServe, or none of that base model.
    """
    kserve = kserve_engines(state)
    is_named = any(payload.model in facts.models for facts in kserve)

    def has_model(facts: EngineFacts) -> bool:
        """An engine that lists no models may have any model, unless another engine lists it."""
        return payload.model in facts.models if is_named else not facts.models

    having = [facts for facts in kserve if has_model(facts)]
    kinds = {facts.kind for facts in having or kserve}
    if len(kinds) == 1:
        payload = replace(payload, kind=kinds.pop())

    def fits(facts: EngineFacts) -> bool:
        return facts.kind in payload.kinds and (not having or has_model(facts)) and has_base(facts, base)

    fitting = fitting_backends(state, fits)
    if fitting is None and base not in BASE_NAMES:
        raise Refused(
            Reason.INVALID_REQUEST, f'no backend of the base model "{clipped(base)}" takes this; use the OpenAI API'
        )
    return payload, fitting or ()


class Eligibility:
    """`kserve_eligibility`, asked once for each sort of request until a backend changes."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
        self._version = -1

    def of(self, state: State, payload: Payload, base: str = "") -> tuple[Payload, tuple[str, ...]]:
        if self._version != state.pool_version or len(self._found) > SORTS_MAX:
            self._found.clear()
            self._version = state.pool_version
        sort = (base, payload.model, *payload.kinds)
        found = self._found.get(sort)
        if found is None:
            eligible, only = kserve_eligibility(state, payload, base)
            found = self._found[sort] = eligible.kind, only
        kind, only = found
        return payload if kind == payload.kind else replace(payload, kind=kind), only


def kserve_engines(state: State) -> list[EngineFacts]:
    """Return the facts of the engines that speak KServe, and the declared facts of empty pools of such engines.

    Raises Refused(INVALID_REQUEST) if there are engines and none speaks it: to come again would not help.
    """
    engines = [*(backend.facts for backend in state.backends.values()), *(facts for _, facts in empty_pools(state))]
    kserve = [facts for facts in engines if speaks_kserve(facts)]
    if engines and not kserve:
        titles = ", ".join(dict.fromkeys(model_kind(facts.kind).title for facts in engines))
        raise Refused(
            Reason.INVALID_REQUEST,
            f"no backend speaks KServe: the engines have an OpenAI API and take no tensors ({titles}); use that API on "
            "the http listener, or Gateway.Generate",
        )
    return kserve


def speaks_kserve(facts: EngineFacts) -> bool:
    return model_kind(facts.kind).native is Native.KSERVE
