"""Make a cost table from a live run's journal.

Fit the cost of a step from a live run as a plane: fixed, per request, per context token, per prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from sidecar.core.facts import DTYPE_BYTES, EngineFacts
from sidecar.errors import Misused, Reason
from sidecar.lab.calibrate.equations import Equation, equations
from sidecar.lab.calibrate.history import History, LoadTime
from sidecar.lab.calibrate.published import COPY_SOURCE, FREE, TO_DEVICE, TO_HOST
from sidecar.pace.cost_plane import Plane, fit_above_zero
from sidecar.pace.cost_table import UNLIMITED_TOKENS, Copy, CostTable, Grid

TERMS = ("the fixed part", "each request of a batch", "each token of context", "each prompt token")
EQUATIONS_MIN = 12
UNCERTAIN_MAX = 0.05
"""The largest standard error of any one term, as a fraction of a step's time."""
NOISE_MIN = 0.01
"""Times are assumed to be no more exact than this, however well the plane fits."""
STALLED = 5.0
"""An equation off by this many typical residuals was a stall and is left out."""


@dataclass(frozen=True)
class Fit:
    """A plane and its accuracy: residuals are fractions of the time; batches and contexts are means of stretches."""

    plane: Plane
    equations: int
    stalled: int
    residual_rms: float
    residual_worst: float
    batches: tuple[float, float]
    contexts_tokens: tuple[float, float]


def fit_plane(equations: Sequence[Equation], whose: str) -> Fit:
    """Return the least-squares plane of relative errors. `whose` names the engine in errors.

    Raises Misused if the run holds too little, or too little variety to tell the terms apart.
    """
    if len(equations) < EQUATIONS_MIN:
        raise _refused(whose, f"it gives {len(equations)} stretches of decoding, and {EQUATIONS_MIN} are needed")
    durations = np.array([equation.duration_ns for equation in equations], dtype=np.float64)
    terms = np.array([equation.terms for equation in equations]) / durations[:, None]
    kept = _without_stalls(terms)
    terms = terms[kept]
    parts = _parts(terms)
    residuals = terms @ parts - 1
    rms = float(np.sqrt(np.mean(residuals**2)))
    used = [equation for equation, is_kept in zip(equations, kept, strict=True) if is_kept and equation.seats]
    fit = Fit(
        plane=Plane(*parts.tolist()),
        equations=len(terms),
        stalled=len(equations) - len(terms),
        residual_rms=rms,
        residual_worst=float(np.max(np.abs(residuals))),
        batches=_range([equation.seats / equation.steps for equation in used]),
        contexts_tokens=_range([equation.context_tokens / equation.seats for equation in used]),
    )
    _check_variety(fit, _uncertain(terms, rms), whose)
    return fit


def _parts(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.maximum(np.max(np.abs(terms), axis=0), 1e-300)
    parts: NDArray[np.float64] = fit_above_zero(terms / scale, np.ones(len(terms))) / scale
    return parts


def _without_stalls(terms: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which equations to keep: not those that took far longer than the others predict."""
    residuals = np.abs(terms @ _parts(terms) - 1)
    return residuals <= max(STALLED * float(np.median(residuals)), UNCERTAIN_MAX)


def _uncertain(terms: NDArray[np.float64], rms: float) -> list[float]:
    """Return each term's standard error as a fraction of a step's time."""
    scale = np.mean(np.abs(terms), axis=0)
    if not scale.all():
        return [0.0 if part else float("inf") for part in scale]
    scaled = terms / scale
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    variances = (vectors**2) @ (1 / np.maximum(values, 1e-12))
    errors: list[float] = (max(rms, NOISE_MIN) * np.sqrt(variances)).tolist()
    return errors


def _check_variety(fit: Fit, uncertain: Sequence[float], whose: str) -> None:
    unclear = [f"{name} (±{error:.0%})" for name, error in zip(TERMS, uncertain, strict=True) if error > UNCERTAIN_MAX]
    if unclear:
        (fewest, most), (shortest, longest) = fit.batches, fit.contexts_tokens
        raise _refused(
            whose,
            f"the parts of a step's time cannot be separated: {', '.join(unclear)}; there were batches of "
            f"{fewest:.0f} to {most:.0f} and mean contexts of {shortest:.0f} to {longest:.0f} tokens",
        )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 0.0)


def _refused(whose: str, problem: str) -> Misused:
    return Misused(
        Reason.CONFIG_INVALID,
        f"the run at {whose} holds too little variety: {problem}; record one with few and with many requests at once, "
        "short and long prompts and answers, streamed",
    )


NO_TIME = Copy(gb_per_s=1e6, overhead_us=0.0)
LOADS_MIN = 4
FAR = 1024.0
"""Any second point defines a straight line; a distant one keeps its slope in the file's digits."""


@dataclass(frozen=True)
class Labels:
    """The names in a table; None takes the journal's."""

    model: str | None = None
    gpu: str | None = None
    engine: str | None = None


def live_table(history: History, backend: str | None, labels: Labels) -> tuple[CostTable, Fit, str]:
    """Return the table of one engine of a run, its fit, and the engine's id.

    Raises Misused if the run tells too little, or if several engines ran and none is named.
    """
    chosen = _chosen(history, backend)
    fit = fit_plane(equations([run for run in history.runs if run.backend == chosen]), f"backend {chosen}")
    loads = [load for load in history.loads if load.backend == chosen]
    to_device, to_host, copy_source = _copies(loads)
    facts = history.facts.get(chosen, EngineFacts())
    kv_tokens, token_bytes = _kv(facts)
    table = CostTable(
        model=labels.model or ", ".join(facts.base_models) or "unnamed model",
        gpu=labels.gpu or "unnamed GPU",
        engine=labels.engine or facts.kind,
        dtype=facts.dtype or "unknown dtype",
        source=(_step_source(fit, chosen), _kv_source(kv_tokens), _LORA_SOURCE, copy_source),
        fixed_ms=fit.plane.fixed_ns / 1e6,
        decode=_decode(fit.plane),
        prefill=_prefill(fit.plane),
        kv_tokens=kv_tokens,
        kv_token_bytes=token_bytes,
        to_device=to_device,
        to_host=to_host,
        lora=FREE,
    )
    return table, fit, chosen


def _chosen(history: History, backend: str | None) -> str:
    known = sorted({run.backend for run in history.runs})
    if not known:
        raise Misused(Reason.CONFIG_INVALID, "the journal holds no dispatched request; record a run under load")
    if backend is None and len(known) > 1:
        raise Misused(
            Reason.CONFIG_INVALID, f"the run has several engines; name one with --backend: {', '.join(known)}"
        )
    if backend is not None and backend not in known:
        raise Misused(
            Reason.CONFIG_INVALID, f'no request was dispatched to the backend "{backend}", but to {", ".join(known)}'
        )
    return backend or known[0]


def _decode(plane: Plane) -> Grid:
    return _grid(lambda batch, context: plane.step_ns(batch, batch * context))


def _prefill(plane: Plane) -> Grid:
    return _grid(lambda requests, tokens: plane.step_ns(0, 0, requests * tokens))


def _grid(step_ns: Callable[[float, float], float]) -> Grid:
    """Return a plane as a grid: interpolation and extrapolation reproduce it exactly."""
    axis = (1.0, FAR)
    return Grid(axis, axis, tuple(tuple(round(step_ns(row, column) / 1e6, 9) for column in axis) for row in axis))


def _copies(loads: Sequence[LoadTime]) -> tuple[Copy, Copy, str]:
    """Return the two copy paths of an adapter and the source of their times; a Load's time counts as `to_host`."""
    if len(loads) < LOADS_MIN:
        return TO_DEVICE, TO_HOST, f"{COPY_SOURCE} The run has {len(loads)} Loads, too few to measure."
    sizes = [load.size_bytes for load in loads]
    if max(sizes) >= 2 * min(sizes):
        terms = np.array([(1.0, size) for size in sizes])
        times = np.array([float(load.duration_ns) for load in loads])
        overhead_ns, per_byte_ns = fit_above_zero(terms / times[:, None], np.ones(len(times))).tolist()
    else:
        overhead_ns, per_byte_ns = median(load.duration_ns for load in loads), 0.0
    gb_per_s = min(NO_TIME.gb_per_s, 1 / per_byte_ns) if per_byte_ns else NO_TIME.gb_per_s
    source = f"copies: {len(loads)} Loads of the run, from the sidecar to the engine's answer, all counted as to_host."
    return NO_TIME, Copy(gb_per_s=gb_per_s, overhead_us=overhead_ns / 1e3), source


_LORA_SOURCE = "lora: the step times include the cost of the run's adapters; nothing is added."


def _step_source(fit: Fit, backend: str) -> str:
    (fewest, most), (shortest, longest) = fit.batches, fit.contexts_tokens
    stalls = f", {fit.stalled} left out as stalls" if fit.stalled else ""
    return (
        f"Step times: a plane of least squares through {fit.equations} stretches of a live run at backend {backend}"
        f"{stalls}, seen from the sidecar; relative residuals {fit.residual_rms:.1%} (root mean square), "
        f"{fit.residual_worst:.1%} at worst; batches of {fewest:.0f} to {most:.0f}, mean contexts of {shortest:.0f} to "
        f"{longest:.0f} tokens: beyond these it is extrapolated."
    )


def _kv(facts: EngineFacts) -> tuple[int, int]:
    """Return the KV tokens and bytes per token, if the engine's size and shape are known."""
    if facts.kv_tokens is None or not (facts.layers and facts.kv_heads and facts.head_size):
        return UNLIMITED_TOKENS, 1
    element_bytes = DTYPE_BYTES.get(facts.dtype or "", 2)
    return facts.kv_tokens, 2 * facts.layers * facts.kv_heads * facts.head_size * element_bytes // facts.tp


def _kv_source(kv_tokens: int) -> str:
    if kv_tokens == UNLIMITED_TOKENS:
        return "kv: the journal does not contain the KV capacity, so no limit is set."
    return "kv: as the engine's gauges or the configuration say."
