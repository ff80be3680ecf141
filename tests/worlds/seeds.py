"""Run one fault seed with all the checks that the tests have."""

from __future__ import annotations

from sidecar.core.core import Core
from sidecar.telling.queue import queue_message
from tests.kit.corekit import assert_idle, check_books
from tests.worlds.trial import Verdict, run_seed


def run(seed: int, flavour: str | None = None) -> Verdict:
    """Run a seed, with engines of one flavour if it is given. Raises SeedFailed with all details."""
    return run_seed(seed, _look, assert_idle, flavour)


def _look(core: Core) -> None:
    """Check the books and read the queue, as an operator does."""
    check_books(core)
    queue_message(core.state, core.state.wake_ns)
