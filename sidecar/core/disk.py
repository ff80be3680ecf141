"""The disk tier under the host store: what was packed once is not fetched and packed again, nor after a restart.

Every blob that came from an origin is written through, within the tier's own budget and by its own policy. The tier is
never needed for an answer: what cannot be written or read there is fetched from its origin, and a tier that fails is
left alone for a while.
"""

from __future__ import annotations

from sidecar.core.effects import DropDisk, Spill
from sidecar.core.events import DiskHolds, Spilled, SpillFailed
from sidecar.core.facts import is_files
from sidecar.core.step import Turn

PAUSE_NS = 30_000_000_000


def is_reading(turn: Turn, key: str) -> bool:
    """Whether a blob is being read into memory; nothing else pins it here."""
    entry = turn.state.disk.entries.get(key)
    return entry is not None and entry.pins > 0


def begin_read(turn: Turn, key: str) -> None:
    """Keep a blob from eviction while it is read."""
    turn.state.disk.pin(key)
    turn.state.disk.used(key, turn.now_ns)


def end_read(turn: Turn, key: str, good: bool) -> None:
    """Give the blob back to the policy; one that could not be read is worth nothing."""
    turn.state.disk.unpin(key)
    if not good:
        turn.state.disk.entries[key].doomed = True
    turn.drop_disk_blob_if_doomed(key)


def spill(turn: Turn, key: str) -> None:
    """Have a blob that has just been packed written through, if there is room that nobody holds."""
    state = turn.state
    entry = state.store.entries[key]
    if is_files(key):
        return  # they lie on a disk already
    if not state.disk.budget_bytes or key in state.disk.entries or turn.now_ns < state.disk_paused_until_ns:
        return
    victims = state.disk.victims_for(entry.size_bytes, turn.now_ns, lambda _: None, None)
    if victims is None:
        return
    for victim in victims:
        state.disk.evictions += 1
        turn.drop_disk_blob(victim)
    state.disk.reserve(key, entry.digest, entry.size_bytes)
    state.store.pin(key)
    turn.emit(Spill(key))


def spilled(turn: Turn, event: Spilled) -> None:
    """A blob is on disk, whole."""
    state = turn.state
    entry = state.disk.entries[event.key]
    state.disk.arrived(event.key, turn.now_ns)
    entry.held_by_operator = state.operator_holds(entry.digest)
    turn.unpin(event.key)
    turn.drop_disk_blob_if_doomed(event.key)


def spill_failed(turn: Turn, event: SpillFailed) -> None:
    """The disk is full, read-only or broken: serving goes on without it, and it is tried again later."""
    turn.state.disk.remove(event.key)
    turn.state.disk_paused_until_ns = turn.now_ns + PAUSE_NS
    turn.unpin(event.key)


def found(turn: Turn, event: DiskHolds) -> None:
    """A blob of an earlier life is there. It is not read before it is needed."""
    state = turn.state
    fits = state.disk.bytes_used + event.size_bytes <= state.disk.budget_bytes
    if event.version not in state.versions or not fits:
        turn.emit(DropDisk(event.key))
        return
    state.disk.reserve(event.key, event.version, event.size_bytes)
    state.disk.arrived(event.key, turn.now_ns)
    state.disk.entries[event.key].held_by_operator = state.operator_holds(event.version)
