"""The options that describe a load and its engines, shared by all commands that take one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.lab.sim.workloads import WORKLOADS


def panel(name: str) -> Callable[..., Any]:
    """Return a function that makes options under a heading of the help: `(help, default, *names)`."""

    def option(words: str, default: str = "", *names: str) -> Any:
        return typer.Option(*names, help=words, show_default=default or False, rich_help_panel=name)

    return option


of_load, of_engines = panel("Load"), panel("Engines")

Workload = Annotated[str | None, of_load(f"Which adapters are requested: {', '.join(WORKLOADS)}.", "round_robin")]
Adapters = Annotated[int | None, of_load("Adapters in all.", "64")]
InFlight = Annotated[
    int | None, of_load("Closed loop: so many requests are outstanding; each sends the next when it ends.", "256")
]
Rate = Annotated[float | None, of_load("Open loop: arrivals per second, independent of endings.")]
ArrivalVariation = Annotated[float | None, of_load("Variation of the gaps; 1 is Poisson.", "1")]
InputTokens = Annotated[int | None, of_load("Mean tokens of a prompt.", "1024")]
OutputTokens = Annotated[int | None, of_load("Mean tokens of an answer.", "1024")]
InputVariation = Annotated[float | None, of_load("Variation of prompt lengths: 0 all alike, 1 exponential.", "0")]
OutputVariation = Annotated[float | None, of_load("Variation of answer lengths.", "0")]
MaxTokens = Annotated[int | None, of_load("Output tokens that every client requests.", "the answer's length")]
Skew = Annotated[float | None, of_load("Exponent of zipf and power.", "1 for zipf, 0.3 for power")]
Drift = Annotated[int | None, of_load("Requests after which a tenth of the adapters swap popularity.", "never")]
Tenants = Annotated[str | None, of_load("Weights of the tenants' arrivals: 20,1,1.", "one tenant")]
Model = Annotated[str | None, of_engines("Whose step times.", "llama-3.1-8b")]
Gpu = Annotated[str | None, of_engines("On which GPU.", "a100_sxm")]
Cost = Annotated[Path | None, of_engines("Cost file, as `sidecar calibrate` writes it.")]
Seats = Annotated[int | None, of_engines("Requests in a running batch.", "256")]
Ranks = Annotated[str | None, of_engines("Ranks of the adapters, in equal numbers: 8,16,64.")]
