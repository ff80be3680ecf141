"""How fast a configured engine is, by the cost file that `backends[].engine.cost` names.

The simulator and the emulated engine read the same files, so what is promised to live requests rests on the figures
that plans are made with.
"""

from __future__ import annotations

from pathlib import Path

from sidecar.core.config import CoreConfig
from sidecar.core.facts import EngineFacts
from sidecar.core.pace import Pace
from sidecar.errors import Misused, Reason
from sidecar.pace.cost import LORA_RANK, CostModel, find_cost
from sidecar.pace.cost_table import BadCostTable

MODULES_USUAL = 7
"""Kinds of projection that adapters change where the engine's are not known: the linear ones of a decoder."""


def pace_from_cost(cost: str, facts: EngineFacts, scale: float = 1.0) -> Pace:
    """Return the pace of an engine with all its slots in use, every time multiplied by `scale`.

    `cost` is a path, or `model/gpu/engine` for a file of ours, as `llama-3.1-8b/a100_sxm/trtllm`. Raises Misused with
    what is wrong with it.
    """
    try:
        model = CostModel.from_file(_path_of(cost), scale, facts.rank_max or LORA_RANK)
    except BadCostTable as error:
        raise Misused(Reason.CONFIG_INVALID, f"engine.cost: {error}") from error
    seats = facts.seats or CoreConfig.seats_default
    modules = len(facts.modules) if facts.modules else MODULES_USUAL
    return Pace(*model.adapted_plane(min(seats, facts.device_pages or seats), modules))


def _path_of(cost: str) -> Path:
    path, parts = Path(cost).expanduser(), cost.split("/")
    if not path.is_file() and len(parts) == 3 and all(parts) and path.suffix != ".json":
        model, gpu, engine = parts
        return find_cost(model, gpu, engine)
    return path
