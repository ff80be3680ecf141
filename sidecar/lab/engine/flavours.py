"""The kinds of engine by scheduler name, each with a plain and an incremental way of planning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sidecar.lab.engine.batch import Planning
from sidecar.lab.engine.planner import Planner
from sidecar.lab.engine.roster import Roster
from sidecar.lab.engine.spec import (
    GUARANTEED_NO_EVICT,
    MAX_REQUESTS,
    MAX_UTILIZATION,
    STATIC_BATCH,
    STRICT_FIFO,
    TRTLLM_PYTORCH,
    VLLM,
    EngineSpec,
)
from sidecar.lab.engine.torch_backend import TorchPlanner, TorchRoster
from sidecar.lab.engine.vllm_planner import VllmPlanner
from sidecar.lab.engine.vllm_roster import VllmRoster
from sidecar.pace.cost import StepCost

Plans = Callable[[EngineSpec, StepCost], Planning]


@dataclass(frozen=True)
class Flavour:
    """`plain` plans every step anew; `quick` plans the same steps with less work, if all that run fit a step."""

    plain: Plans
    quick: Plans


_plain = partial(Planner, jump=False)
_jumping = partial(Planner, jump=True)

FLAVOURS: dict[str, Flavour] = {
    GUARANTEED_NO_EVICT: Flavour(_plain, Roster),
    STRICT_FIFO: Flavour(_plain, partial(Roster, is_strict=True)),
    MAX_UTILIZATION: Flavour(_plain, _jumping),
    STATIC_BATCH: Flavour(_plain, _jumping),
    MAX_REQUESTS: Flavour(_plain, _jumping),
    VLLM: Flavour(VllmPlanner, VllmRoster),
    TRTLLM_PYTORCH: Flavour(partial(TorchPlanner, jump=False), TorchRoster),
}


def planning_of(spec: EngineSpec, cost: StepCost, jump: bool) -> Planning:
    """Return an engine's planner; without `jump` the plain one, which the other must equal."""
    flavour = FLAVOURS[spec.scheduler]
    is_quick = jump and spec.max_batch_size <= spec.max_tokens_per_step
    return flavour.quick(spec, cost) if is_quick else flavour.plain(spec, cost)
