"""The backend kind `triton`: its configuration, how it is connected, and what its models can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from sidecar.backends.api import Backend
from sidecar.backends.kind import Checks, Kind, ModelKind, Native, Wiring, with_kind
from sidecar.backends.triton import asking
from sidecar.config.backends import HOST
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import MESSAGE_BYTES_MAX, EngineFacts

GRPC_PORT, METRICS_PORT = 8001, 8002

CORE = ModelKind(
    name="triton",
    title="TensorRT-LLM by Triton",
    native=Native.KSERVE,
    asking=asking.CORE,
    text_model="ensemble",
)
LLMAPI = ModelKind(
    name="triton_llmapi",
    title="TensorRT-LLM by Triton",
    native=Native.KSERVE,
    asking=asking.LLMAPI,
    recognises=lambda rank: rank("text_input") == 1,  # no other model takes text without a batch dimension
    reads_files=True,
)


class TritonEntry(Entry):
    """A Triton server with a TensorRT-LLM model, by `triton://HOST:PORT`, the port of its gRPC.

    `model` is the engine's core model, `text_model` the one before it that takes text, `models` others that clients ask
    for by name. Where a pool has several core models, a request goes to those backends that have the model it names.

    One that takes weights reads them from shared memory where it can (`weights_transport: auto`), and `backends list`
    says whether it does. `{host}` in `metrics` is the host of an engine that was found.
    """

    SCHEMES: ClassVar = {"triton": False}
    ELSEWHERE: ClassVar = {
        "vllm://": {
            "api_key_file": "Triton has no API keys; tls with a certificate of ours says who we are",
            "old_versions": "it is about versions of vLLM",
        }
    }

    model: str = "tensorrt_llm"
    text_model: str = "ensemble"
    models: tuple[str, ...] = ()
    metrics: str | None = None
    weights_transport: Literal["auto", "grpc", "shared_memory"] = "auto"

    @property
    def shared_memory(self) -> Literal["never", "auto", "must"]:  # type: ignore[override]
        """Whether its weights are kept in memory that it can read."""
        wanted: dict[str, Literal["never", "auto", "must"]] = {"grpc": "never", "shared_memory": "must"}
        return wanted.get(self.weights_transport, "auto")

    @property
    def place(self) -> tuple[str, ...]:
        """A server may have several core models, each an engine."""
        return (self.address, self.model)

    @property
    def metrics_url(self) -> str | None:
        """Where its metrics are: as given, or on the usual port of a server on the usual port; None if unknown."""
        return self.metrics or usual_metrics_url(self.address)

    def _at_host(self, host: str) -> dict[str, Any]:
        return {"metrics": None if self.metrics is None else self.metrics.replace(HOST, host)}

    @model_validator(mode="after")
    def _finds_metrics_of_each(self) -> Self:
        if self.discover is not None and self.metrics is not None and HOST not in self.metrics:
            raise ValueError(f"metrics: with discover it needs {HOST}, as in http://{HOST}:{METRICS_PORT}/metrics")
        return self


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
    from sidecar.backends.triton.checks import CHECKS

    return CHECKS


def usual_metrics_url(address: str) -> str | None:
    """Return the metrics URL of a Triton server on the default gRPC port; None for one on another port."""
    host, _, port = address.rpartition(":")
    return f"http://{host}:{METRICS_PORT}/metrics" if port == str(GRPC_PORT) else None


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
