"""Put the keys of a backup beside those that are known where it is restored. No I/O.

A revoked key stays in the registry as an entry that says so. What a backup says of a key is older: revoked wins.
So does an entry that this release cannot read, as of a later one: it may be revoked, and the key is refused as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sidecar.access.entries import KEY, Key, from_json
from sidecar.state.codec import UnreadableRecord
from sidecar.state.contents import Contents
from sidecar.state.registry import Change

Raw = tuple[str, str]
"""An entry's name and its JSON, which is not read."""


@dataclass(frozen=True)
class Keys:
    """What became of the keys of a backup.

    `brought_back` are good, and the place did not know them: nothing tells whether they were revoked since.
    `stay_revoked` are good in the backup and were revoked since. `stay_unread` are the ids of those good in the backup
    whose entries in the place this release cannot read: they stay as they are there, without effect.
    """

    restored: int = 0
    brought_back: tuple[Key, ...] = ()
    stay_revoked: tuple[Key, ...] = ()
    stay_unread: tuple[str, ...] = ()


def merged(
    backup: Contents[Raw], there: Iterable[Raw], elsewhere: Iterable[Raw], now: float, with_keys: bool
) -> tuple[Contents[Raw], Keys]:
    """Return the entries to write, and what becomes of the keys.

    `there` is what the place holds, `elsewhere` what else its data directory knows of keys. Without `with_keys` the
    keys that are there stay, and those of the backup are left out.
    """
    known = {name: text for name, text in there if name.startswith(KEY)}
    ended = {name: text for name, text in (*elsewhere, *known.items()) if _is_ended(name, text)}
    had = {name: text for _, (name, text) in backup.records if name.startswith(KEY)}
    wanted = {**(had if with_keys else known), **ended}
    now_good = {name: key for name, text in wanted.items() if (key := _good(name, text, now)) is not None}
    outdone = {name: key for name, text in had.items() if name in ended and (key := _good(name, text, now)) is not None}
    unread = {name for name in outdone if _key(name, ended[name]) is None}
    keys = Keys(
        restored=len(had) if with_keys else 0,
        brought_back=tuple(key for name, key in sorted(now_good.items()) if name not in known),
        stay_revoked=tuple(key for name, key in sorted(outdone.items()) if with_keys and name not in unread),
        stay_unread=tuple(outdone[name].id for name in sorted(unread) if with_keys),
    )
    return _with_keys(backup, had, wanted), keys


def _with_keys(backup: Contents[Raw], had: Mapping[str, str], wanted: Mapping[str, str]) -> Contents[Raw]:
    """Return the backup with other keys; each difference is a further change of its log."""
    records = {name: (number, (name, text)) for number, (name, text) in backup.records}
    changes = list(backup.changes)
    number = backup.last_change
    for name in sorted(had.keys() | wanted.keys()):
        if had.get(name) == wanted.get(name):
            continue
        number += 1
        record = (name, wanted[name]) if name in wanted else None
        changes.append(Change(number, name, record))
        if record is None:
            del records[name]
        else:
            records[name] = number, record
    return replace(
        backup,
        records=tuple(records[name] for name in sorted(records)),
        changes=tuple(changes),
        last_change=number,
    )


def _key(name: str, text: str) -> Key | None:
    try:
        entry = from_json(name, text)
    except UnreadableRecord:
        return None
    return entry if isinstance(entry, Key) else None


def _is_ended(name: str, text: str) -> bool:
    """Return True for a key that is revoked, or that nobody can tell of."""
    key = _key(name, text)
    return name.startswith(KEY) and (key is None or key.revoked_at is not None)


def _good(name: str, text: str, now: float) -> Key | None:
    key = _key(name, text)
    return key if key is not None and key.state(now) == "active" else None
