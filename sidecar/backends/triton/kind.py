"""The backend kind `triton`: how it is declared, connected and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sidecar.backends.api import Backend
from sidecar.backends.kind import Checks, Kind, Wiring, with_kind
from sidecar.backends.triton.entry import CORE, GRPC_PORT, LLMAPI, TritonEntry
from sidecar.core.facts import MESSAGE_BYTES_MAX, EngineFacts


def _declare(entry: TritonEntry, declared: EngineFacts, all_of_kind: Sequence[TritonEntry]) -> EngineFacts:
    # The server says which model it has once it is reached. Until then a shared folder means the LLM-API model.
    declared = with_kind(declared, CORE if entry.adapters_dir is None else LLMAPI)
    several = len({each.model for each in all_of_kind}) > 1 or any(each.models for each in all_of_kind)
    return replace(declared, models=(entry.model, entry.text_model, *entry.models)) if several else declared


def _connect(entry: TritonEntry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    from sidecar.backends.triton.backend import TritonBackend

    if entry.weights_transport == "grpc" or wiring.memory.mount is None:
        declared = replace(declared, message_bytes_max=MESSAGE_BYTES_MAX)  # certain before it is reached
    return TritonBackend(entry, declared, wiring), declared


def _checks() -> Checks:
    from sidecar.backends.triton.checks.rows import CHECKS

    return CHECKS


def _notes(entry: TritonEntry, declared: EngineFacts) -> Iterator[str]:
    if declared.pages_assumed and (declared.device_pages or declared.host_pages_total):
        yield (
            "each adapter is counted as one page, since the engine's modules and layers are not declared: one that "
            "takes more may wait inside the engine, where no queue shows it; backends[].engine.config names the "
            "engine's config.json"
        )
    if entry.discover is None and entry.metrics_url is None:
        patience_s = entry.progress_timeout_s
        yield (
            f"no metrics, by which an engine that stalls is taken for lost after {patience_s:g} s: without them it is "
            f"asked for a token first, and that takes as long again; backends[].metrics names their URL where gRPC is "
            f"not at port {GRPC_PORT}"
        )


TRITON = Kind("triton", TritonEntry, (CORE, LLMAPI), _connect, _declare, _checks, _notes)
