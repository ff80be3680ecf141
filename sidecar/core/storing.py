"""Acts on the store: pin, drop and doom blobs; forget versions that nothing needs any more."""

from __future__ import annotations

import heapq

from sidecar.core import eligibility
from sidecar.core.effects import Drop, DropDisk
from sidecar.core.facts import is_files
from sidecar.core.step import Step


def queue_fetch(step: Step, key: str) -> None:
    """Queue a fetch for a blob that a waiting request needs and the store does not have."""
    position = step.state.next_position(key)
    if position is not None:
        heapq.heappush(step.state.hungry_heap, (position, key))
        step.hungry = True


def handle_loss(step: Step, key: str) -> None:
    """Handle the loss of a blob, or of an engine's copy of it, while requests may wait for it."""
    queue_fetch(step, key)
    if key in step.state.wanted and not step.state.store.has(key) and eligibility.is_needed(step.state, key):
        step.state.lateness.misses(key, step.now_ns)


def unpin(step: Step, key: str) -> None:
    """Unpin a blob; "" stands for a run that had nothing to pin because it began on a belief alone."""
    if not key:
        return
    step.state.store.unpin(key)
    step.hungry = True
    entry = step.state.store.entries[key]
    if entry.doomed and not entry.pins:
        drop_blob(step, key)


def drop_blob(step: Step, key: str) -> None:
    """Free an unused blob; fetch it again if a request waits for it."""
    digest = step.state.store.entries[key].digest
    if is_files(key):
        _forget_readers(step, key, digest)
    step.state.store.remove(key)
    step.state.where.store_changed(step.state, digest)
    step.emit(Drop(key))
    handle_loss(step, key)
    step.hungry = True


def _forget_readers(step: Step, key: str, version: str) -> None:
    """Believe that engines which read a version's files no longer hold it: the files go, and it is unloaded."""
    for backend in step.state.in_order(step.state.where.held.get(version, ())):
        if step.state.packed_for(version, backend).key == key:
            backend.shadow.forget(version)
            step.state.where.lost(step.state, backend, (version,))
            slot = backend.slots.get(version)
            if slot is not None and not backend.slot_in_use(slot):
                backend.close_slot(version)


def doom_blob(step: Step, key: str) -> None:
    """Free a blob as soon as it is unused."""
    entry = step.state.store.entries.get(key)
    if entry is None:
        return
    if entry.ready and not entry.pins:
        drop_blob(step, key)
    else:
        entry.doomed = True
        step.state.where.store_changed(step.state, entry.digest)


def doom_disk_blob(step: Step, key: str) -> None:
    """Delete a blob from the disk tier as soon as it is neither written nor read."""
    step.state.disk.entries[key].doomed = True
    drop_disk_blob_if_doomed(step, key)


def drop_disk_blob_if_doomed(step: Step, key: str) -> None:
    entry = step.state.disk.entries[key]
    if entry.doomed and entry.ready and not entry.pins:
        drop_disk_blob(step, key)


def drop_disk_blob(step: Step, key: str) -> None:
    step.state.disk.remove(key)
    step.emit(DropDisk(key))


def forget_version_if_unused(step: Step, digest: str) -> None:
    """Forget a version that has no name and no request, with its blobs."""
    version = step.state.versions.get(digest)
    if version is None or version.names or version.requests or version.loads:
        return
    for key in step.state.store.keys_of(digest):
        doom_blob(step, key)
    for key in step.state.disk.keys_of(digest):
        doom_disk_blob(step, key)
    step.state.forget_derived(digest=digest)
    step.state.suspects.pop(digest, None)
    del step.state.versions[digest]
