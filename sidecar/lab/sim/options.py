"""The options of a simulation, and the checks of each one and of their combinations.

The defaults follow SqueezeBits' measurements: Llama-3.1-8B on an A100, 64 adapters in rotation, 1,024 tokens in and
out, 256 seats, 256 requests in flight, and 8 slots (a value that they varied). The product has its own defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sidecar.config.plugins import known, resolve
from sidecar.errors import Misused, Reason
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.option_values import check_known, check_once, check_ranges, check_together
from sidecar.lab.sim.setup import MODULES, Sidecar
from sidecar.lab.sim.workloads import WORKLOADS

BARE = "none"
"""The name by which `--ordering` means the bare engine, with no sidecar in front of it."""
LORA_MODULES = (*MODULES, BARE)

DRAWN = (
    "workload", "adapters", "input_tokens", "output_tokens", "input_cv", "output_cv", "skew", "drift", "tenants",
    "rate", "load", "arrival_cv",
)  # fmt: skip
"""Options that define a generated load; a trace or a journal takes its place."""
OF_A_RUN = ("trace", "max_tokens", "seeds", "rank", "ranks", "lora_modules", *DRAWN)
"""Options whose values come from the journal when one is given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options as they are named on the command line; None means "not given".

    Raises Misused for an invalid value or an invalid combination.
    """

    workload: str | None = None
    trace: Path | None = None
    journal: Path | None = None
    """The journal of a live run; the command that reads it builds the runs."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_cv: float | None = None
    output_cv: float | None = None
    max_tokens: int | None = None
    adapters: int | None = None
    skew: float | None = None
    drift: int | None = None
    tenants: tuple[float, ...] | None = None
    requests: int | None = None
    in_flight: int | None = None
    rate: float | None = None
    load: float | None = None
    arrival_cv: float | None = None
    seeds: tuple[int, ...] | None = None

    model: str | None = None
    gpu: str | None = None
    cost: Path | None = None
    engine: str | None = None
    backends: int | None = None
    seats: int | None = None
    slots: int | None = None
    host_slots: int | None = None
    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    lora_modules: str | None = None
    load_ms: float | None = None

    order: str | None = None
    compare: tuple[str, ...] | None = None
    route: str | None = None
    store: str | None = None
    store_bytes: int | None = None
    prefetch: str | None = None
    wait_limit: float | None = None
    patience: float | None = None

    def __post_init__(self) -> None:
        check_ranges(self.given)
        check_once(self.given, "compare", "seeds")
        self._check_excluded()
        check_known("workload", self.workload, WORKLOADS)
        check_known("engine", self.engine, FLAVOURS)
        check_known("lora_modules", self.lora_modules, LORA_MODULES)
        self._check_policies()
        self._check_ranks()

    @property
    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _check_excluded(self) -> None:
        given = self.given
        check_together(given, "trace", DRAWN, "a trace already defines the arrivals")
        check_together(given, "journal", OF_A_RUN, "a journal already defines the arrivals and the engines")
        check_together(given, "in_flight", ("rate", "load"), "a closed loop sends a request when another has ended")
        check_together(given, "rate", ("load",), "both set the arrival rate")
        check_together(given, "cost", ("model", "gpu"), "the file names its own model and GPU")
        check_together(given, "order", ("compare",), "--compare takes several orders")
        if self.arrival_cv is not None and self.rate is None and self.load is None:
            raise Misused(Reason.CONFIG_INVALID, "--arrival-cv needs --rate or --load: a closed loop has no gaps")
        if self.tenants is not None and not sum(self.tenants):
            raise Misused(Reason.CONFIG_INVALID, "--tenants needs a weight above 0, or no tenant sends requests")

    def _check_policies(self) -> None:
        """Raise Misused for an unknown policy. A policy given as a class is imported here."""
        for name in self.orders:
            if name != BARE and ":" not in name:
                check_known("order" if self.compare is None else "compare", name, [BARE, *sorted(known("ordering"))])
            if name != BARE:
                resolve("ordering", name)
        for kind, option in (("routing", self.route), ("eviction", self.store), ("prefetch", self.prefetch)):
            if option is not None:
                resolve(kind, option)

    def _check_ranks(self) -> None:
        if self.rank is not None and self.ranks is not None and max(self.ranks) > self.rank:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"--ranks has {max(self.ranks)} and --rank {self.rank} is the largest that the engine is built for",
            )

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders to run; "none" is the bare engine."""
        return self.compare or (self.order or Sidecar.ordering,)
