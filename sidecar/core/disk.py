"""The disk tier under the host store: packed blobs survive eviction and restarts without a new fetch and pack.

Every blob that came from an origin is written through, within the tier's own budget and by its own eviction policy.
No answer depends on the tier: a blob that cannot be written or read there is fetched from its origin, and a tier
that fails is not used for `PAUSE_NS`.
"""

from __future__ import annotations

from sidecar.core import storing
from sidecar.core.effects import DropDisk, Spill
from sidecar.core.events import DiskHolds, Spilled, SpillFailed
from sidecar.core.facts import is_files
from sidecar.core.step import Step

PAUSE_NS = 30_000_000_000


def is_reading(step: Step, key: str) -> bool:
    """Return True while a blob is read into memory; nothing else pins a blob on disk."""
    entry = step.state.disk.entries.get(key)
    return entry is not None and entry.pins > 0


def begin_read(step: Step, key: str) -> None:
    """Pin a blob while it is read."""
    step.state.disk.pin(key)
    step.state.disk.used(key, step.now_ns)


def end_read(step: Step, key: str, good: bool) -> None:
    """Unpin a blob after a read. A blob that could not be read is deleted."""
    step.state.disk.unpin(key)
    if not good:
        step.state.disk.entries[key].doomed = True
    storing.drop_disk_blob_if_doomed(step, key)


def spill(step: Step, key: str) -> None:
    """Write a blob that has just been packed through to disk, if there is space or something evictable."""
    state = step.state
    entry = state.store.entries[key]
    if is_files(key):
        return  # they are on a disk already
    if not state.disk.budget_bytes or key in state.disk.entries or step.now_ns < state.disk_paused_until_ns:
        return
    victims = state.disk.victims_for(entry.size_bytes, step.now_ns, lambda _: None, None)
    if victims is None:
        return
    for victim in victims:
        state.disk.evictions += 1
        storing.drop_disk_blob(step, victim)
    state.disk.reserve(key, entry.digest, entry.size_bytes)
    state.store.pin(key)
    step.emit(Spill(key))


def spilled(step: Step, event: Spilled) -> None:
    """Handle Spilled: a whole blob is on disk."""
    state = step.state
    entry = state.disk.entries[event.key]
    state.disk.arrived(event.key, step.now_ns)
    entry.held_by_operator = state.operator_holds(entry.digest)
    storing.unpin(step, event.key)
    storing.drop_disk_blob_if_doomed(step, event.key)


def spill_failed(step: Step, event: SpillFailed) -> None:
    """Handle SpillFailed: the disk is full, read-only or broken. Serving goes on without it; it is retried later."""
    step.state.disk.remove(event.key)
    step.state.disk_paused_until_ns = step.now_ns + PAUSE_NS
    storing.unpin(step, event.key)


def found(step: Step, event: DiskHolds) -> None:
    """Handle DiskHolds: a blob of an earlier process is on disk. It is read only once it is needed."""
    state = step.state
    fits = state.disk.bytes_used + event.size_bytes <= state.disk.budget_bytes
    if event.version not in state.versions or not fits:
        step.emit(DropDisk(event.key))
        return
    state.disk.reserve(event.key, event.version, event.size_bytes)
    state.disk.arrived(event.key, step.now_ns)
    state.disk.entries[event.key].held_by_operator = state.operator_holds(event.version)
