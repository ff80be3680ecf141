"""Build the runs of a simulation from its options: a pool, a load, and one run for each order and seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from sidecar.core.config import ClassLimit
from sidecar.errors import Misused, Reason
from sidecar.lab.engine.shape import SHAPES
from sidecar.lab.sim.bounds import Lengths, all_resident
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.options import BARE, Options
from sidecar.lab.sim.results import engines_of, step_times
from sidecar.lab.sim.setup import MODULES, SECOND_NS, EngineSetup, Setup, Sidecar
from sidecar.lab.sim.traces import trace_workload
from sidecar.lab.sim.workloads import Arrival, LoadParameters, Workload, workload
from sidecar.pace.cost import CostModel, NoCostTable, find_cost
from sidecar.pace.cost_table import BadCostTable

WORKLOAD = "round_robin"
MODEL, GPU = "llama-3.1-8b", "a100_sxm"
IN_FLIGHT = 256
FOR_EVER = ClassLimit(queue_wait_ns_max=1_000_000_000 * SECOND_NS)


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Run:
    """One simulation to run. `notes` are sentences for the user on values derived from the options."""

    label: str
    setup: Setup
    workload: Workload
    notes: tuple[str, ...] = ()


def runs_of(options: Options) -> Iterator[Run]:
    """Yield a run for each seed and order; all orders of a seed get the same arrivals. Raises Misused."""
    engine, notes = engine_of(options)
    pool = Setup(engine=engine, engines=options.backends or 1, in_flight=options.in_flight or IN_FLIGHT)
    for seed in options.seeds or (LoadParameters.seed,):
        load, load_notes = load_of(options, pool, seed)
        for order in options.orders:
            setup = replace(pool, sidecar=sidecar_of(options, order, load.open_loop))
            yield Run(order, setup, load, notes + load_notes)


# Engines.


def engine_of(options: Options) -> tuple[EngineSetup, tuple[str, ...]]:
    """Return the engine of the pool, and notes on it. Raises Misused for an impossible one."""
    slots = options.slots or EngineSetup.slots
    rank = options.rank or max(options.ranks or (EngineSetup.rank,))
    engine = EngineSetup(
        cost=cost_of(options, options.engine or EngineSetup.flavour, rank),
        slots=slots,
        host_slots=options.host_slots or max(EngineSetup.host_slots, slots),
        rank=rank,
        **given(
            flavour=options.engine,
            seats=options.seats,
            modules=MODULES.get(options.lora_modules or ""),
            load_ns=None if options.load_ms is None else round(options.load_ms * 1e6),
        ),
    )
    if options.load_ms is not None and not engine.kind.reads_files:
        raise Misused(
            Reason.CONFIG_INVALID, f"--load-ms: {engine.flavour} is sent its adapters and reads none; leave it out"
        )
    if engine.host_slots < slots:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"--host-slots {engine.host_slots} is less than --slots {slots}: adapters on the GPU are in the host cache "
            "too",
        )
    _check_room(engine, options)
    return engine, shape_notes(engine)


def cost_of(options: Options, flavour: str, rank: int) -> CostModel:
    """Return the step times from a file, or those of the model and GPU with the flavour's engine. Raises Misused."""
    try:
        path = options.cost or find_cost(options.model or MODEL, options.gpu or GPU, FLAVOURS[flavour].engine)
        cost = CostModel.from_file(path, lora_rank=rank)
    except NoCostTable as error:
        raise Misused(Reason.CONFIG_INVALID, f"{error} with --cost FILE") from error
    except BadCostTable as error:
        raise Misused(Reason.CONFIG_INVALID, str(error)) from error
    return _without_adapters(cost) if options.lora_modules == BARE else cost


def _without_adapters(cost: CostModel) -> CostModel:
    """Return the same step times with adapters that add nothing to a step."""
    lora = cost.table.lora
    nothing = tuple((0.0,) * len(row) for row in lora.loss)
    table = replace(cost.table, lora=replace(lora, loss=nothing, loss_from_2_to_64=0.0))
    return CostModel(table, cost.scale, cost.lora_rank)


def _check_room(engine: EngineSetup, options: Options) -> None:
    """Raise Misused if a mean request of the generated load does not fit an engine."""
    output_tokens = options.max_tokens or options.output_tokens or LoadParameters.output_tokens
    tokens = (options.input_tokens or LoadParameters.input_tokens) + output_tokens
    if options.trace is not None:
        tokens = 1  # its requests that do not fit fail individually
    if tokens > engine.kv_tokens:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"a request of {tokens:,} tokens does not fit an engine: {engine.slots:,} slots of "
            f"{engine.adapter_bytes / 1e6:,.0f} MB leave room for {engine.kv_tokens:,} tokens of keys and values; "
            "take fewer slots, a smaller rank or shorter requests",
        )
    if tokens > engine.sequence_tokens_max:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"a request of {tokens:,} tokens is longer than the {engine.sequence_tokens_max:,} that engines take",
        )


def shape_notes(engine: EngineSetup) -> tuple[str, ...]:
    """Return a note if the sizes of adapters are those of another model."""
    model = engine.cost.table.model
    if model in SHAPES:
        return ()
    return (f"adapters are sized as {engine.shape.name}'s: the shape of {model} is not known",)


# Loads.


def load_of(options: Options, pool: Setup, seed: int) -> tuple[Workload, tuple[str, ...]]:
    """Return the load, and notes on it. Raises Misused."""
    ranks = options.ranks or (pool.engine.rank,)
    if options.trace is None:
        return _drawn(options, pool, seed, ranks)
    trace = trace_workload(
        options.trace,
        open_loop=options.in_flight is None,
        ranks=ranks,
        seed=seed,
        output_tokens_max=options.max_tokens or 0,
    )
    trace = without_versions(trace)
    return (trace if options.requests is None else first_of(trace, options.requests)), ()


def _drawn(options: Options, pool: Setup, seed: int, ranks: tuple[int, ...]) -> tuple[Workload, tuple[str, ...]]:
    parameters = LoadParameters(
        seed=seed,
        ranks=ranks,
        **given(
            adapters=options.adapters,
            input_tokens=options.input_tokens,
            output_tokens=options.output_tokens,
            input_variation=options.input_cv,
            output_variation=options.output_cv,
            output_tokens_max=options.max_tokens,
            requests=options.requests,
            arrival_variation=options.arrival_cv,
            skew=options.skew,
            drift_requests=options.drift,
            tenant_shares=options.tenants,
            rate_per_s=options.rate,
        ),
    )
    name = options.workload or WORKLOAD
    drawn = workload(name, parameters)
    if options.load is None:
        return drawn, ()
    rate = options.load * capacity_requests_per_s(pool, drawn, parameters)
    share = f"{options.load:g} of what the engines could answer if every adapter had a slot"
    note = f"{rate:.4g} requests arrive in a second, {share}"
    return workload(name, replace(parameters, rate_per_s=rate)), (note,)


def capacity_requests_per_s(pool: Setup, load: Workload, parameters: LoadParameters) -> float:
    """Return the requests per second that the pool could answer with a slot for every adapter and endless backlog."""
    longest = parameters.output_tokens_max or parameters.output_tokens
    answer = min(parameters.output_tokens, longest)
    lengths = Lengths(parameters.input_tokens, answer, parameters.input_tokens + longest)
    times = step_times(pool, len(load.adapters))
    return all_resident(times, lengths, engines_of(pool)).tokens_per_s / answer


def first_of(load: Workload, requests: int) -> Workload:
    """Return the first requests of a load, or all if it has fewer."""

    def arrivals() -> Iterator[Arrival]:
        return islice(iter(load), requests)

    asked: dict[str, int] = {}
    for arrival in arrivals():
        asked[arrival.adapter] = asked.get(arrival.adapter, 0) + 1
    total = sum(asked.values())
    asked.pop("", None)
    return replace(
        load,
        adapters=tuple(asked),
        requests=total,
        arrivals=arrivals,
        shares={name: count / total for name, count in asked.items()},
    )


def without_versions(load: Workload) -> Workload:
    """Return a load without "@" in adapter names: the core would read "sql@v8" as version 8 of "sql"."""
    names = {name: name.replace("@", "·") for name in load.adapters}
    if all(name == whole for name, whole in names.items()):
        return load
    return replace(
        load,
        adapters=tuple(dict.fromkeys(names.values())),
        ranks={names[name]: rank for name, rank in load.ranks.items()},
        shares={names[name]: share for name, share in load.shares.items()},
        arrivals=lambda: (replace(one, adapter=names.get(one.adapter, "")) for one in load),
    )


# The sidecar.


def sidecar_of(options: Options, order: str, open_loop: bool) -> Sidecar | None:
    """Return the sidecar in front of the engines; None for the bare engine.

    By default, clients of a closed loop wait without limit and those of an open loop up to the product's limits.
    """
    if order == BARE:
        return None
    limit = class_limit(options, ClassLimit() if open_loop else FOR_EVER)
    return Sidecar(ordering=order, classes={"default": limit}, **given_policies(options))


def given_policies(options: Options) -> dict[str, Any]:
    """Return the fields of a sidecar that the options set, except its order."""
    return given(
        routing=options.route,
        eviction=options.store,
        prefetch=options.prefetch,
        store_bytes=options.store_bytes,
    )


def class_limit(options: Options, usual: ClassLimit) -> ClassLimit:
    """Return a class's limit changed by the options that were given."""
    limits = given(queue_wait_ns_max=options.wait_limit, patience_ns=options.patience)
    return replace(usual, **{name: round(seconds * SECOND_NS) for name, seconds in limits.items()})
