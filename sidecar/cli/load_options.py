"""The options that describe a load and its engines, as every command that takes one names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.lab.sim.workloads import WORKLOADS


def panel(name: str) -> Callable[..., Any]:
    """Return a maker of options under a heading of the help: `(words, default, *names)`."""

    def option(words: str, default: str = "", *names: str) -> Any:
        return typer.Option(*names, help=words, show_default=default or False, rich_help_panel=name)

    return option


of_load, of_engines = panel("Load"), panel("Engines")

Workload = Annotated[str | None, of_load(f"Which adapter is asked for: {', '.join(WORKLOADS)}.", "round_robin")]
Adapters = Annotated[int | None, of_load("Adapters in all.", "64")]
InFlight = Annotated[
    int | None, of_load("Closed loop: so many are outstanding, each sends the next when it ends.", "256")
]
Rate = Annotated[float | None, of_load("Open loop: arrivals per second, whatever has ended.")]
ArrivalVariation = Annotated[float | None, of_load("Variation of the gaps; 1 is Poisson.", "1")]
InputTokens = Annotated[int | None, of_load("Mean tokens of a prompt.", "1024")]
OutputTokens = Annotated[int | None, of_load("Mean tokens of an answer.", "1024")]
InputVariation = Annotated[float | None, of_load("Variation of prompt lengths: 0 all alike, 1 exponential.", "0")]
OutputVariation = Annotated[float | None, of_load("Variation of answer lengths.", "0")]
MaxTokens = Annotated[int | None, of_load("What every client asks for at most.", "each exactly what it will get")]
Skew = Annotated[float | None, of_load("Exponent of zipf and power.", "1 for zipf, 0.3 for power")]
Drift = Annotated[int | None, of_load("After each so many requests a tenth of the adapters swap places.", "never")]
Tenants = Annotated[str | None, of_load("Weights of the tenants' arrivals: 20,1,1.", "one tenant")]
Model = Annotated[str | None, of_engines("Whose step times.", "llama-3.1-8b")]
Gpu = Annotated[str | None, of_engines("On which GPU.", "a100_sxm")]
Cost = Annotated[Path | None, of_engines("Cost file, as `sidecar calibrate` writes it.")]
Seats = Annotated[int | None, of_engines("Requests in a running batch.", "256")]
Ranks = Annotated[str | None, of_engines("Ranks of the adapters, in equal numbers: 8,16,64.")]
