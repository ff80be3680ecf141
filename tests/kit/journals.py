"""Write journals of a world in virtual time, as a serving process does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sidecar.config.plugins import policies_of
from sidecar.core import eligibility
from sidecar.core.core import Core
from sidecar.core.events import Event
from sidecar.core.state import NEVER_NS, State
from sidecar.journal import codec
from sidecar.journal.snapshot import snapshot_of
from sidecar.journal.writer import Journal
from tests.kit.corekit import World

Waits = dict[int, dict[str, int]]
"""The time that each request waited for each reason."""


def write_journal(
    world: World, directory: Path, segment_bytes: int = 1 << 20, leave_out: Callable[[int], bool] | None = None
) -> None:
    """Write the journal of a world's core; `leave_out` selects steps that the journal's thread drops."""
    core = Core(world.config, policies_of(world.config))
    journal = Journal(core, directory, segment_bytes, segments_max=10_000)
    journal.start()
    for number, (now_ns, event) in enumerate(world.events):
        if leave_out is not None:
            journal.flush()
            journal._resume_ns = NEVER_NS if leave_out(number) else 0
            if leave_out(number) and journal._recording:
                journal._interrupt(NEVER_NS)
        journal.observed(event, core.step(event, now_ns), now_ns)
    journal.stop()


def waits_of(world: World, events: Sequence[tuple[int, Event]]) -> Waits:
    """Return the waits of all requests, by asking the core about each of them after every step."""
    core = Core(world.config, policies_of(world.config))
    waits: Waits = {}
    asked: dict[int, str] = {}
    before_ns = 0
    for now_ns, event in events:
        for request, why in asked.items():
            held = waits.setdefault(request, {})
            held[why] = held.get(why, 0) + now_ns - before_ns
        core.step(event, now_ns)
        asked = {
            request.id: eligibility.why_waiting(core.state, request, now_ns).value
            for request in core.state.requests.values()
            if not request.running and not request.settled
        }
        before_ns = now_ns
    return {request: {why: ns for why, ns in held.items() if ns} for request, held in waits.items()}


def written_state(state: State) -> bytes:
    """Return what a journal writes of a state of the core."""
    return codec.dumps(snapshot_of(state))


def restored(state: State) -> Core:
    """Return a core in the state that a journal would have written."""
    return codec.restore(codec.loads(written_state(state)), policies_of(state.config))
