"""The checks of a live server of the OpenAI family, each a row: of one that registers adapters, and of one whose
requests carry them.
"""

from __future__ import annotations

from sidecar.backends.checks.finding import LOAD_S, LOOK_S, RUN_S, SPARE_S
from sidecar.backends.kind import CheckStep
from sidecar.backends.openai.checks import carried, declared, names, server, tried

_REACHED = (
    CheckStep("reachable", server.reachable, limit_s=2 * LOOK_S),
    CheckStep("health", server.health, ("reachable",)),
    CheckStep("TLS", server.encrypted, ("reachable",)),
)
REGISTERING = (
    *_REACHED,
    CheckStep("version", server.version, ("reachable",)),
    CheckStep("API key", server.api_key, ("reachable",)),
    CheckStep("model", server.model, ("API key",)),
    CheckStep("LoRA updating", names.updating, ("health", "API key")),
    CheckStep("adapters", names.registered, ("model",)),
    CheckStep("metrics", declared.metrics, ("reachable",)),
    CheckStep("shared folder", declared.folder, ("reachable",)),
    CheckStep("base model", server.base, ("health", "model"), RUN_S + SPARE_S),
    CheckStep(
        "adapter",
        tried.adapter,
        ("version", "LoRA updating", "shared folder", "base model"),
        LOAD_S + RUN_S + SPARE_S,
    ),
    CheckStep("slots", declared.slots, ("reachable",)),
    CheckStep("kept in memory", declared.memory, ("reachable",)),
    CheckStep("seats", declared.seats, ("reachable",)),
    CheckStep("rank", declared.rank, ("reachable",)),
)
"""Slots come late: vLLM's metrics have them after the first request."""
CARRYING = (
    *_REACHED,
    CheckStep("whole", server.whole, ("reachable",)),
    CheckStep("base model", server.base, ("health", "whole"), RUN_S + SPARE_S),
    CheckStep("metrics", declared.metrics, ("base model",)),
    CheckStep("shared folder", declared.folder, ("reachable",)),
    CheckStep("LoRA", carried.lora, ("reachable",)),
    CheckStep("adapter", carried.adapter, ("base model", "shared folder", "LoRA"), LOAD_S + RUN_S + SPARE_S),
    CheckStep("kept in memory", carried.memory, ("LoRA",)),
    CheckStep("seats", declared.seats, ("whole",)),
    CheckStep("rank", carried.rank, ("LoRA",)),
)
