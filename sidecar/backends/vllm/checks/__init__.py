"""The checks of a live vLLM server."""

from __future__ import annotations

from typing import Any

from sidecar.backends.checking import LOOK_S, SPARE_S
from sidecar.backends.checks.finding import LOAD_S, RUN_S
from sidecar.backends.kind import Checks, CheckStep
from sidecar.backends.vllm.checks import declared, registered, runs, server
from sidecar.backends.vllm.checks.look import open_look
from sidecar.backends.vllm.kind import VllmEntry


def _target(entry: VllmEntry) -> dict[str, Any]:
    return {"api_key_file": entry.api_key_file, "old_versions": entry.old_versions}


STEPS = (
    CheckStep("reachable", server.reachable, limit_s=2 * LOOK_S),
    CheckStep("version", server.version, ("reachable",)),
    CheckStep("health", server.health, ("reachable",)),
    CheckStep("TLS", server.encrypted, ("reachable",)),
    CheckStep("API key", server.api_key, ("reachable",)),
    CheckStep("model", server.model, ("API key",)),
    CheckStep("LoRA updating", registered.updating, ("health", "API key")),
    CheckStep("adapters", registered.registered, ("model",)),
    CheckStep("metrics", declared.metrics, ("reachable",)),
    CheckStep("shared folder", runs.folder, ("reachable",)),
    CheckStep("base model", runs.base, ("health", "model"), RUN_S + SPARE_S),
    CheckStep(
        "adapter",
        runs.adapter,
        ("version", "LoRA updating", "shared folder", "base model"),
        LOAD_S + RUN_S + SPARE_S,
    ),
    CheckStep("slots", declared.slots, ("reachable",)),
    CheckStep("kept in memory", declared.memory, ("reachable",)),
    CheckStep("seats", declared.seats, ("reachable",)),
    CheckStep("rank", declared.rank, ("reachable",)),
)
"""Slots come late: the metrics have them after the first request."""

CHECKS = Checks(STEPS, open_look, _target)
