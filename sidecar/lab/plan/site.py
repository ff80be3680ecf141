"""From a plan's options to the common part of all candidates: step times, the model's shape, ranks, the load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from sidecar.adapters.base_model import BaseModel, base_model_of, read_base_model
from sidecar.errors import Misused, Reason
from sidecar.lab.calibrate.measured import PACKAGE, Measured
from sidecar.lab.calibrate.table import measured_table
from sidecar.lab.engine.shape import SHAPES, ModelShape
from sidecar.lab.plan.candidates import Site
from sidecar.lab.plan.demand import Demand, demand_of
from sidecar.lab.plan.layout import CacheLayout, pytorch_layout, trtllm_layout, vllm_layout
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.runs import GPU, MODEL, cost_of
from sidecar.lab.sim.setup import MODULES, EngineSetup, Setup
from sidecar.pace.cost import CostModel, NoCostTable, cost_name, find_cost

ENGINES = {"trtllm": "trtllm_no_evict", "vllm": "vllm", "trtllm_pytorch": "trtllm_pytorch"}
"""The engines that can be planned for, and the flavour by which each is simulated."""
LAYOUTS: dict[str, Callable[[ModelShape, Sequence[str], Sequence[int]], CacheLayout]] = {
    "trtllm_no_evict": trtllm_layout,
    "vllm": vllm_layout,
    "trtllm_pytorch": pytorch_layout,
}
"""By flavour, what divides its caches for adapters of these modules and ranks."""
HOST_MEMORY_BYTES = 64 << 30

OnProgress = Callable[[str, int, int], None]


def site_of(
    options: Options,
    model_config: Path | None = None,
    host_memory_bytes: int = HOST_MEMORY_BYTES,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Site:
    """Return the site that the options describe. Raises Misused for what cannot be planned, saying what can.

    `on_progress` is called with the progress of step times that must be looked up first.
    """
    flavour, ranks = options.engine or EngineSetup.flavour, _ranks(options)
    modules = MODULES.get(options.lora_modules or "qv", MODULES["qv"])
    cost, named, measured = _cost(options, flavour, max(ranks), on_progress)
    shape = _shape(cost, model_config, measured)
    layout = LAYOUTS[flavour](shape, modules, ranks)
    cost = CostModel(cost.table, cost.scale, layout.max_rank)
    seats = options.seats or EngineSetup.seats
    pool = Setup(engine=EngineSetup(cost=cost, flavour=flavour, seats=seats, rank=layout.max_rank, modules=modules))
    site = Site(
        cost=cost,
        cost_named=named,
        shape=shape,
        layout=layout,
        flavour=flavour,
        seats=seats,
        modules=modules,
        host_memory_bytes=host_memory_bytes,
        demand=demand_of(options, pool, ranks),
    )
    _check(site)
    return site


def _ranks(options: Options) -> tuple[int, ...]:
    """Return the adapters' ranks. A single rank applies to all."""
    return options.ranks or (options.rank or EngineSetup.rank,)


# Step times.


def _cost(options: Options, flavour: str, rank: int, on_progress: OnProgress) -> tuple[CostModel, str, Measured | None]:
    """Return the step times and their name in the sidecar's configuration, "" for none.

    They come from the given file, one in the working directory, one that comes with the product, or the measurements.
    """
    if options.cost is not None:
        return cost_of(options, flavour, rank), str(options.cost), None
    model, gpu, engine = options.model or MODEL, options.gpu or GPU, FLAVOURS[flavour].engine
    beside = Path(cost_name(model, gpu, engine))
    if beside.is_file():
        return cost_of(replace(options, model=None, gpu=None, cost=beside), flavour, rank), str(beside), None
    try:
        find_cost(model, gpu, engine)
    except NoCostTable as error:
        cost, measured = _measured(model, gpu, engine, rank, str(error), on_progress)
        return cost, "", measured
    return cost_of(options, flavour, rank), f"{model}/{gpu}/{engine}", None


def _measured(
    model: str, gpu: str, engine: str, rank: int, problem: str, on_progress: OnProgress
) -> tuple[CostModel, Measured]:
    try:
        measured = Measured(model, gpu, engine)
    except Misused as error:
        if find_spec(PACKAGE) is None:
            raise Misused(Reason.CONFIG_INVALID, f"{problem} with --cost FILE; {error.message}") from error
        raise Misused(Reason.CONFIG_INVALID, f"{error.message}; --cost FILE takes one of your own") from error
    return CostModel(measured_table(measured, on_progress), lora_rank=rank), measured


# Shapes.


def _shape(cost: CostModel, model_config: Path | None, measured: Measured | None) -> ModelShape:
    """Return the model's shape, which determines the size of adapters; another model's would be wrong."""
    model = cost.table.model
    if model_config is not None:
        return shape_of(model, read_base_model(model_config))
    if model in SHAPES:
        return SHAPES[model]
    if measured is not None:
        return _published_shape(model, measured.model_path)
    raise Misused(
        Reason.CONFIG_INVALID,
        f"the size of an adapter of {model} is unknown without its shape, and the known shapes are those of "
        f"{', '.join(SHAPES)}; give the model's config.json, or its folder, as --model-config",
    )


def _published_shape(model: str, path: str) -> ModelShape:
    """Return a shape from the config.json that comes with the measurements."""
    file = files(PACKAGE) / "model_configs" / f"{path.replace('/', '--')}_config.json"
    try:
        return shape_of(model, base_model_of(json.loads(file.read_text("utf-8"))))
    except (OSError, ValueError) as error:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"the measurements have no shape of {model} ({error}); give its config.json as --model-config",
        ) from error


def shape_of(model: str, base: BaseModel) -> ModelShape:
    """Return a shape from a model's own configuration. Raises Misused if it is no dense decoder."""
    query, up = base.modules.get("attn_q"), base.modules.get("mlp_h_to_4h")
    if query is None or up is None or "moe_router" in base.modules:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{model} is a mixture of experts, and the layout of adapters for those is not supported; plan for a "
            "dense model",
        )
    heads = base.heads
    return ModelShape(model, query[0], base.layers, heads.query, heads.key_value, heads.size, up[1], vocab=0)


# Memory.


def check_slots(site: Site, slots: int | None) -> None:
    """Raise Misused for more slots than leave a request its KV memory."""
    most = min(site.slots_max, site.demand.adapters)
    if slots is not None and slots > most:
        why = "there are no more adapters" if most == site.demand.adapters else "more leave no KV memory for a request"
        raise Misused(Reason.CONFIG_INVALID, f"--slots {slots}: expected at most {most:,}, {why}")


def _check(site: Site) -> None:
    """Raise Misused if no plan is possible: a request or an adapter exceeds the memory."""
    demand, longest = site.demand, EngineSetup.sequence_tokens_max
    if demand.longest_tokens > longest:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"a request of {demand.longest_tokens:,} tokens is longer than the {longest:,} that engines take",
        )
    if site.cost.kv_tokens() < demand.longest_tokens:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{site.cost.table.model} on {site.cost.table.gpu} has memory for the keys and values of "
            f"{site.cost.kv_tokens():,} tokens and a request takes {demand.longest_tokens:,}; take a GPU with more "
            "memory or shorter requests",
        )
    if not site.slots_max:
        adapter_bytes = site.layout.pages_of_one * site.layout.page_bytes
        raise Misused(
            Reason.CONFIG_INVALID,
            f"an adapter of rank {max(demand.ranks)} takes {adapter_bytes / 1e9:.2f} GB on the GPU, and beside it no "
            f"keys and values are left for a request of {demand.longest_tokens:,} tokens; take a smaller rank, fewer "
            "modules or a GPU with more memory",
        )
    _check_host(site, demand)


def _check_host(site: Site, demand: Demand) -> None:
    needed = site.candidate(1, 1).host_memory_needed
    if needed > site.host_memory_bytes:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"host memory for a single slot is {needed / 1e9:.1f} GB and --host-memory is "
            f"{site.host_memory_bytes / 1e9:.1f} GB: {demand.adapters:,} adapters of {site.packed_bytes / 1e9:.2f} GB",
        )
