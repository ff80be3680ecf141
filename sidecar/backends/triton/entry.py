"""The configuration of a Triton server, and its kinds of model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from sidecar.backends.kind import ModelKind, Native
from sidecar.backends.triton import asking
from sidecar.config.backends import HOST
from sidecar.config.backends import Backend as Entry

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


def usual_metrics_url(address: str) -> str | None:
    """Return the metrics URL of a Triton server on the default gRPC port; None for one on another port."""
    host, _, port = address.rpartition(":")
    return f"http://{host}:{METRICS_PORT}/metrics" if port == str(GRPC_PORT) else None
