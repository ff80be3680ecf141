"""The checks of a live Triton server, each a row."""

from __future__ import annotations

from typing import Any

from sidecar.backends.checks.finding import LOAD_S, LOOK_S, RUN_S, SPARE_S
from sidecar.backends.kind import Checks, CheckStep
from sidecar.backends.triton.checks import engine, memory, metrics, model, runs, server
from sidecar.backends.triton.checks.look import open_look
from sidecar.backends.triton.entry import CORE, LLMAPI, TritonEntry, usual_metrics_url


def _target(entry: TritonEntry) -> dict[str, Any]:
    return {
        "model": entry.model,
        "metrics_url": entry.metrics,
        "usual_metrics_url": usual_metrics_url(entry.address),
        "transport": entry.weights_transport,
    }


STEPS = (
    CheckStep("reachable", server.reachable, limit_s=2 * LOOK_S),
    CheckStep("ready", server.ready, ("reachable",)),
    CheckStep("model", server.model, ("ready",)),
    CheckStep("kind", model.kind, ("model",)),
    CheckStep("LoRA inputs", model.lora_inputs, ("kind",)),
    CheckStep("dtype", model.dtype, ("LoRA inputs",), kind=CORE.name),
    CheckStep("decoupled", model.decoupled, ("model",)),
    CheckStep("batch", model.batch, ("kind",)),
    CheckStep("instances", model.instances, ("kind",), kind=CORE.name),
    CheckStep("engine", engine.engine, ("kind",)),
    CheckStep("cache", engine.cache, ("LoRA inputs",), kind=CORE.name),
    CheckStep("metrics", metrics.metrics, ("reachable",)),
    CheckStep("queue", model.queue, ("model",)),
    CheckStep("shared memory", memory.shared_memory, ("reachable",), kind=CORE.name),
    CheckStep("TLS", server.encrypted, ("reachable",)),
    CheckStep("base model", runs.base, ("batch",), RUN_S + SPARE_S),
    CheckStep("adapter", runs.adapter, ("LoRA inputs", "base model"), LOAD_S + SPARE_S, CORE.name),
    CheckStep("adapter, shared", runs.adapter_shared, ("adapter",), LOAD_S + SPARE_S, CORE.name),
    CheckStep("resident", runs.resident, ("adapter",), RUN_S + SPARE_S, CORE.name),
    CheckStep("unknown id", runs.unknown_id, ("LoRA inputs", "base model"), RUN_S + SPARE_S, CORE.name),
    CheckStep("shared folder", runs.folder, ("LoRA inputs",), kind=LLMAPI.name),
    CheckStep("adapter", runs.adapter_files, ("shared folder", "base model"), LOAD_S + SPARE_S, LLMAPI.name),
)

CHECKS = Checks(STEPS, open_look, _target)
