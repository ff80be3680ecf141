"""Make the backends of a configuration, with what is declared of their engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sidecar.access.budgets.counting import PromptCounter
from sidecar.adapters.base_model import BaseModel, read_base_model, with_base_model
from sidecar.adapters.shared_memory import NOT_SHARED, SharedMemory, claim_shared_memory
from sidecar.adapters.staging import Staging
from sidecar.backends.api import Backend
from sidecar.backends.engine_facts import from_engine_config
from sidecar.backends.kind import Wiring
from sidecar.backends.registry import kind_named
from sidecar.config.backends import Backend as Entry
from sidecar.config.backends import declared_facts
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason
from sidecar.pace.engine_pace import pace_from_cost

logger = logging.getLogger(__name__)


def shared_memory_for(entries: Sequence[Entry], store_bytes: int) -> SharedMemory:
    """Return the memory for the store's blobs, shared if engines on this machine can read it there.

    What dead processes have left there is removed. Raises Misused if a backend requires shared memory and there is not
    enough.
    """
    wanted = {entry.shared_memory for entry in entries} - {"never"}
    if not wanted:
        return NOT_SHARED
    memory = claim_shared_memory(store_bytes)
    if memory.mount is None and "must" in wanted:
        raise Misused(Reason.CONFIG_INVALID, f"weights_transport: shared_memory: {memory.why_not}")
    return memory


def make_backends(entries: Sequence[Entry], wiring: Wiring) -> list[tuple[Backend, EngineFacts]]:
    """Return the backends of the entries that have an address, each with the known facts of its engine."""
    facts = facts_of(entries)
    _warn_of_unchecked(entries)
    return [make_backend(entry, facts[entry.identity], wiring) for entry in entries if entry.discover is None]


def make_backend(entry: Entry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    """Return the backend of an entry that has an address, with the known facts of its engine."""
    kind = kind_named(entry.kind_name)
    return kind.connect(entry, declared, wiring)


def pools_of(entries: Sequence[Entry]) -> dict[str, EngineFacts]:
    """Return the declared facts of the engines of each pool whose engines come and go."""
    facts = facts_of(entries)
    return {entry.identity: facts[entry.identity] for entry in entries if entry.discover is not None}


def stagings_of(entries: Sequence[Entry]) -> list[Staging]:
    """Return the folders from which engines read adapters' files, each once."""
    shared = [entry.shared_dir.ours for entry in entries if entry.shared_dir is not None]
    return [Staging(folder) for folder in dict.fromkeys(shared)]


def facts_of(entries: Sequence[Entry]) -> dict[str, EngineFacts]:
    """Return the declared facts of each backend's engine, by the backend's id. Asks no engine."""
    found = {}
    for entry in entries:
        try:
            found[entry.identity] = _facts_of(entry, entries)
        except Misused as error:
            raise Misused(error.reason, f"{entry.identity}: {error.message}") from error
    return found


def _facts_of(entry: Entry, entries: Sequence[Entry]) -> EngineFacts:
    engine = entry.engine
    declared = declared_facts(entry, from_engine_config(Path(engine.config).expanduser()) if engine.config else None)
    if engine.cost is not None:
        declared = replace(declared, pace=pace_from_cost(engine.cost, declared, engine.cost_scale))
    kind = kind_named(entry.kind_name)
    alike = [other for other in entries if kind_named(other.kind_name) is kind]
    declared = kind.declare(entry, declared, alike)
    return with_base_model(declared, base_model_of(entry))


def base_models(entries: Sequence[Entry]) -> dict[str, BaseModel]:
    """Return the base models whose files are configured, by all their names."""
    found: dict[str, BaseModel] = {}
    for entry in entries:
        model = base_model_of(entry)
        if model is not None and entry.base_model is not None:
            found |= dict.fromkeys((entry.base_model.name, *entry.base_model.aliases), model)
    return found


def prompt_counter_of(entries: Sequence[Entry]) -> PromptCounter | None:
    """Return what counts prompts, None if no tokenizer is configured. Raises Misused if one cannot be read."""
    files: dict[str, Path] = {}
    for entry in entries:
        if (base := entry.base_model) is not None and base.tokenizer is not None:
            files |= dict.fromkeys((base.name, *base.aliases), Path(base.tokenizer).expanduser())
    return PromptCounter(files) if files else None


def base_model_of(entry: Entry) -> BaseModel | None:
    """Read the base model's own config; None if it is not configured. Raises Misused if it is malformed."""
    base = entry.base_model
    return None if base is None or base.config is None else read_base_model(Path(base.config).expanduser())


def _warn_of_unchecked(entries: Sequence[Entry]) -> None:
    """Warn of engines for which adapters' sizes are not checked, if their kind has a warning for that."""
    known = base_models(entries)
    without: dict[str, list[str]] = {}
    for entry in entries:
        if entry.adapters_dir is not None and (entry.base_model is None or entry.base_model.name not in known):
            without.setdefault(entry.kind_name, []).append(entry.identity)
    for name, backends in without.items():
        unchecked = kind_named(name).unchecked
        if unchecked is not None:
            logger.warning("%s", unchecked(backends))
