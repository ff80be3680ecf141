"""A replica's copy of a registry on disk, from which it starts while Redis is away.

The copy continues the one in memory: it has the entries with their heads and the position in the stream of changes. A
replica that reads it and then reaches Redis again merges the two as after any outage (see `history`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Generic

from sidecar.adapters.durable import DurableFiles
from sidecar.state.codec import Codec, R
from sidecar.state.redis.copy import TOMBSTONES_MS
from sidecar.state.redis.entries import Entry, entry_of, value_of
from sidecar.state.redis.history import Position

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Kept(Generic[R]):
    """What a replica knew, and the time (Unix seconds) of Redis' last answer. `place` names the Redis and the keys."""

    place: str
    answered_at: float
    position: Position
    entries: tuple[tuple[str, Entry[R]], ...]


def write_kept(path: Path, kept: Kept[R], codec: Codec[R]) -> None:
    """Replace the file; only this user may read it. Raises OSError."""
    fields = {
        "format": FORMAT,
        "place": kept.place,
        "answered_at": kept.answered_at,
        "position": kept.position,
        "entries": {name: value_of(entry, codec) for name, entry in kept.entries},
    }
    begun = path.with_name(path.name + ".new")
    files, descriptor = DurableFiles(), os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        files.write(descriptor, memoryview(json.dumps(fields).encode()))
        files.sync(descriptor)
    finally:
        os.close(descriptor)
    files.rename(begun, path)
    files.sync_directory(path.parent)


def read_kept(path: Path, place: str, codec: Codec[R]) -> Kept[R] | None:
    """Return the copy of this place, or None if there is none that can be used.

    A copy that is older than tombstones are kept could bring back what was removed since.
    """
    try:
        fields = json.loads(path.read_bytes())
        if fields["format"] != FORMAT or fields["place"] != place:
            raise ValueError("it is of another Redis or another release")
        answered_at = min(float(fields["answered_at"]), time())  # a clock that was set back must not prolong it
        if not time() - answered_at < TOMBSTONES_MS / 1000:
            raise ValueError("it is too old")
        incarnation, applied, mark = fields["position"]
        position = Position(str(incarnation), int(applied), str(mark))
        entries: Iterable[tuple[str, str]] = fields["entries"].items()
        return Kept(place, answered_at, position, tuple((name, entry_of(name, text, codec)) for name, text in entries))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("the copy %s is not used: %s", path, error)
        return None
