"""The checks of a live trtllm-serve."""

from __future__ import annotations

from typing import Any

from sidecar.backends.checking import LOOK_S, SPARE_S
from sidecar.backends.checks.finding import LOAD_S, RUN_S
from sidecar.backends.kind import Checks, CheckStep
from sidecar.backends.trtllm.checks import declared, server
from sidecar.backends.trtllm.checks.look import open_look
from sidecar.backends.trtllm.kind import TrtllmEntry


def _target(entry: TrtllmEntry) -> dict[str, Any]:
    return {"own": entry}


STEPS = (
    CheckStep("reachable", server.reachable, limit_s=2 * LOOK_S),
    CheckStep("health", server.health, ("reachable",)),
    CheckStep("TLS", server.encrypted, ("reachable",)),
    CheckStep("whole", server.whole, ("reachable",)),
    CheckStep("base model", server.base, ("health", "whole"), RUN_S + SPARE_S),
    CheckStep("metrics", server.metrics, ("base model",)),
    CheckStep("shared folder", declared.folder, ("reachable",)),
    CheckStep("LoRA", declared.lora, ("reachable",)),
    CheckStep("adapter", declared.adapter, ("base model", "shared folder", "LoRA"), LOAD_S + RUN_S + SPARE_S),
    CheckStep("kept in memory", declared.memory, ("LoRA",)),
    CheckStep("seats", declared.seats, ("whole",)),
    CheckStep("rank", declared.rank, ("LoRA",)),
)

CHECKS = Checks(STEPS, open_look, _target)
