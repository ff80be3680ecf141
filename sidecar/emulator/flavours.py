"""The kinds of engine by the name of their scheduler."""

from __future__ import annotations

from sidecar.emulator.batch import Planning
from sidecar.emulator.messages import StepCost
from sidecar.emulator.planner import Planner
from sidecar.emulator.roster import Roster
from sidecar.emulator.spec import GUARANTEED_NO_EVICT, STRICT_FIFO, VLLM, EngineSpec
from sidecar.emulator.vllm_planner import VllmPlanner
from sidecar.emulator.vllm_roster import VllmRoster


def planning_of(spec: EngineSpec, cost: StepCost, jump: bool) -> Planning:
    """How an engine plans; without `jump` always the plain way, which the others must equal."""
    never_cut = spec.max_batch_size <= spec.max_tokens_per_step
    if spec.scheduler == VLLM:
        return VllmRoster(spec, cost) if jump and never_cut else VllmPlanner(spec, cost)
    if jump and never_cut and spec.scheduler in (GUARANTEED_NO_EVICT, STRICT_FIFO):
        return Roster(spec, cost)
    return Planner(spec, cost, jump)
