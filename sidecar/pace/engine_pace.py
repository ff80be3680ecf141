"""The pace of a configured engine, from the cost file that `backends[].engine.cost` names.

The simulator and the emulated engine read the same files, so promises to live requests and plans rest on the same
figures.
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
"""Kinds of projection that adapters are assumed to change if the engine's are unknown: a decoder's linear ones."""


def pace_from_cost(cost: str, facts: EngineFacts, scale: float = 1.0) -> Pace:
    """Return the pace of an engine with all slots in use, with every time multiplied by `scale`.

    `cost` is a path, or `model/gpu/engine` for a packaged file, e.g. `llama-3.1-8b/a100_sxm/trtllm`. Raises Misused if
    the file is missing or invalid.
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
