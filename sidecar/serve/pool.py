"""From a configuration to its backends: what each is told, and what is declared of its engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sidecar.adapters.base_model import BaseModel, read_base_model, with_base_model
from sidecar.adapters.staging import Staging
from sidecar.backends.api import Backend
from sidecar.backends.engine_facts import from_engine_config
from sidecar.backends.triton.backend import TritonBackend, TritonOptions
from sidecar.backends.triton.dialects import TRITON, TRITON_LLMAPI, VLLM
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.backends.triton.transport import NOT_SHARED, SharedMemory, claim_shared_memory
from sidecar.backends.vllm.backend import VllmBackend, VllmOptions
from sidecar.backends.vllm.checks.declared import sizes_unknown
from sidecar.config import Backend as BackendConfig
from sidecar.config import Config, declared_facts, plugins
from sidecar.core.facts import MESSAGE_BYTES_MAX, EngineFacts
from sidecar.errors import Misused, Reason
from sidecar.pace.engine_pace import pace_from_cost

logger = logging.getLogger(__name__)

TRITON_GRPC_PORT, TRITON_METRICS_PORT = 8001, 8002


def shared_memory_for(config: Config) -> SharedMemory:
    """Return where the store's blobs are to lie so that engines on this machine can read them there.

    What processes that live no more have left there is removed. Raises Misused where a backend insists on shared memory
    and there is not enough.
    """
    wanted = {backend.weights_transport for backend in config.backends if backend.scheme == "triton"} - {"grpc"}
    if not wanted:
        return NOT_SHARED
    memory = claim_shared_memory(config.store.memory_bytes)
    if memory.mount is None and "shared_memory" in wanted:
        raise Misused(Reason.CONFIG_INVALID, f"weights_transport: shared_memory: {memory.why_not}")
    return memory


def make_backends(
    configured: Sequence[BackendConfig], loader: LoaderProcess, memory: SharedMemory = NOT_SHARED, owner: str = ""
) -> list[tuple[Backend, EngineFacts]]:
    """Return the backends of a configuration that have an address, each with the facts that are declared of it.

    `owner` is this replica's id, one of several.
    """
    facts = facts_of(configured)
    unchecked = list(_unchecked(configured))
    if unchecked:
        logger.warning("%s", sizes_unknown(unchecked))
    return [
        make_backend(backend, facts[backend.identity], loader, memory, owner)
        for backend in configured
        if backend.discover is None
    ]


def make_backend(
    backend: BackendConfig,
    declared: EngineFacts,
    loader: LoaderProcess,
    memory: SharedMemory = NOT_SHARED,
    owner: str = "",
) -> tuple[Backend, EngineFacts]:
    """Return the backend of one entry that has an address."""
    if backend.scheme == TRITON:
        if backend.weights_transport == "grpc" or memory.mount is None:
            declared = replace(declared, message_bytes_max=MESSAGE_BYTES_MAX)  # known before it is reached
        options = _triton_options(backend, declared, memory, owner)
        return TritonBackend(options, loader), options.facts
    if backend.scheme == VLLM:
        vllm = _vllm_options(backend, declared)
        return VllmBackend(vllm), vllm.facts
    kind = plugins.resolve("backend", backend.scheme)
    return kind(backend, declared, loader), declared


def pools_of(configured: Sequence[BackendConfig]) -> dict[str, EngineFacts]:
    """Return what is declared of the engines of each pool in which they come and go."""
    facts = facts_of(configured)
    return {backend.identity: facts[backend.identity] for backend in configured if backend.discover is not None}


def stagings_of(configured: Sequence[BackendConfig]) -> list[Staging]:
    """Return the folders that engines read adapters' files from, each once."""
    shared = [backend.adapters_dir.places.ours for backend in configured if backend.adapters_dir is not None]
    return [Staging(folder) for folder in dict.fromkeys(shared)]


def facts_of(configured: Sequence[BackendConfig]) -> dict[str, EngineFacts]:
    """Return what is declared of each backend's engine, by the backend's id; nothing is asked of anyone."""
    found = {}
    tritons = [backend for backend in configured if backend.scheme != VLLM]
    several = len({backend.model for backend in tritons}) > 1 or any(backend.models for backend in tritons)
    for backend in configured:
        engine = backend.engine
        declared = declared_facts(backend, from_engine_config(Path(engine.config)) if engine.config else None)
        if engine.cost is not None:
            declared = replace(declared, pace=pace_from_cost(engine.cost, declared, engine.cost_scale))
        if backend.scheme == VLLM:
            declared = replace(declared, kind=VLLM)
        elif backend.adapters_dir is not None:
            declared = replace(declared, kind=TRITON_LLMAPI)  # until its model is seen
        if several and backend.scheme != VLLM:
            declared = replace(declared, models=(backend.model, backend.text_model, *backend.models))
        found[backend.identity] = with_base_model(declared, base_model_of(backend))
    return found


def base_models(configured: Sequence[BackendConfig]) -> dict[str, BaseModel]:
    """Return the base models whose files are named, by every name that they have."""
    found: dict[str, BaseModel] = {}
    for backend in configured:
        model = base_model_of(backend)
        if model is not None and backend.base_model is not None:
            found |= dict.fromkeys((backend.base_model.name, *backend.base_model.aliases), model)
    return found


def base_model_of(backend: BackendConfig) -> BaseModel | None:
    """Read the base model's own config. Raises Misused with what is wrong with it."""
    base = backend.base_model
    return None if base is None or base.config is None else read_base_model(Path(base.config).expanduser())


def _unchecked(configured: Sequence[BackendConfig]) -> Iterator[str]:
    """Yield the vLLMs that adapters are loaded into whose sizes are checked against no model's files."""
    known = base_models(configured)
    for backend in configured:
        if backend.scheme == VLLM and backend.adapters_dir is not None:
            base = backend.base_model
            if base is None or base.name not in known:
                yield backend.identity


def _triton_options(backend: BackendConfig, facts: EngineFacts, memory: SharedMemory, owner: str) -> TritonOptions:
    return TritonOptions(
        id=backend.identity,
        address=backend.address,
        facts=facts,
        metrics_url=backend.metrics or usual_metrics_url(backend.address),
        model=backend.model,
        text_model=backend.text_model,
        tls=backend.tls.model_dump(exclude_none=True) if backend.tls else None,
        transport=backend.weights_transport,
        memory=memory,
        adapters_dir=backend.adapters_dir.places if backend.adapters_dir else None,
        progress_timeout_s=backend.progress_timeout_s,
        load_timeout_s=backend.load_timeout_s,
        owner=owner,
    )


def _vllm_options(backend: BackendConfig, facts: EngineFacts) -> VllmOptions:
    return VllmOptions(
        id=backend.identity,
        address=backend.address,
        adapters_dir=backend.adapters_dir.places if backend.adapters_dir else None,
        facts=facts,
        tls=backend.tls.model_dump(exclude_none=True) if backend.tls else None,
        api_key_file=backend.api_key_file,
        old_versions=backend.old_versions,
        progress_timeout_s=backend.progress_timeout_s,
        load_timeout_s=backend.load_timeout_s,
    )


def usual_metrics_url(address: str) -> str | None:
    """Return where a Triton server on its usual gRPC port has its metrics, None for one on another port."""
    host, _, port = address.rpartition(":")
    return f"http://{host}:{TRITON_METRICS_PORT}/metrics" if port == str(TRITON_GRPC_PORT) else None
