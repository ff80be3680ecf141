"""Which backends a request can go to, by the kind of model that it is written for and by the model that it names.

TensorRT-LLM's core model takes token ids and its ensemble text; the LLM-API model takes text under names of its own. A
pool may have both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sidecar.backends.api import Payload
from sidecar.backends.dialects import KSERVE_KINDS, VLLM
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Reason, Refused


def backends_of(state: State, kinds: Collection[str]) -> tuple[str, ...] | None:
    """Return the backends of some kinds, () for any where there are no others; None where there are others only."""
    fitting = tuple(backend.id for backend in state.backends.values() if backend.facts.kind in kinds)
    if len(fitting) == len(state.backends):
        return ()
    return fitting or None


def as_it_is(state: State, payload: Payload) -> tuple[Payload, tuple[str, ...]]:
    """Return a KServe client's own request and the backends that it is held to, () for any.

    Where all backends are of one kind it goes there whatever it looks like: what is wrong with it is the engine's to
    say, an unknown model's name too. Raises Refused(INVALID_REQUEST) where nobody speaks KServe.
    """
    backends = [backend for backend in state.backends.values() if backend.facts.kind in KSERVE_KINDS]
    if state.backends and not backends:
        raise Refused(
            Reason.INVALID_REQUEST,
            "no backend speaks KServe: these are vLLM; use the OpenAI API on the http listener, or Gateway.Generate",
        )
    having = [backend for backend in backends if not backend.facts.models or payload.model in backend.facts.models]
    kinds = {backend.facts.kind for backend in having or backends}
    if len(kinds) == 1:
        payload = replace(payload, kind=kinds.pop())
    fitting = tuple(backend.id for backend in having or backends if backend.facts.kind in payload.kinds)
    return payload, () if len(fitting) == len(state.backends) else fitting


def base_names(facts: EngineFacts) -> tuple[str, ...]:
    """Return what clients may call an engine's base model: its own names, and what a vLLM serves it as."""
    return (*facts.base_models, *(facts.models if facts.kind == VLLM else ()))
