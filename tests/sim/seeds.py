"""One fault seed with all that the tests know to ask of the core."""

from __future__ import annotations

from sidecar.sim.faults.trial import Verdict, run_seed
from tests.corekit import assert_idle, check_books


def run(seed: int) -> Verdict:
    """Run a seed; raises SeedFailed with all that is needed to look into it."""
    return run_seed(seed, check_books, assert_idle)
