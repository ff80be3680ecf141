"""Fit the cost of a step from a live run as a plane: fixed, per request, per context token, per prompt token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.errors import Misused, Reason
from sidecar.lab.calibrate.equations import Equation
from sidecar.pace.cost_plane import Plane, fit_above_zero

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
