"""`sidecar state backup` and `restore`: the shared state in one file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.serving import resolve
from sidecar.cli.show import AsJson, count, duration, print_json, size

if TYPE_CHECKING:
    from sidecar.access.backup import Restored, StateLocation, Summary
    from sidecar.access.entries import Key

File = Annotated[Path, typer.Argument(help="The backup.", show_default=False)]
Configuration = Annotated[
    Path | None, typer.Option("--config", help="The sidecar's configuration.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option("--data-directory", help="Its data directory.", show_default="the configuration's"),
]

DAY_S = 86_400
DAYS_FROM_S = 2 * DAY_S
"""From here on an age is told in days."""


def backup(
    file: File,
    config: Configuration = None,
    data: Data = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write names, keys, limits and the usage of the data directory into one file. Sidecars may run meanwhile.

    Names, keys and limits are in the data directory, or in the configuration's Redis. Weights are not in the file.
    """
    from sidecar.access.backup import backup as write

    location = _location(config, data)
    summary = asyncio.run(write(location, file, force))
    if as_json:
        print_json({"file": str(file), **asdict(summary)})
    else:
        say(f"{file}: {size(file.stat().st_size)} from {location} with {_held(summary, summary.keys)}")


def restore(
    file: File,
    config: Configuration = None,
    data: Data = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the state that is there.")] = False,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Leave API keys as they are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup into the data directory, or into the configuration's Redis. No sidecar may run on them.

    A key that is revoked there stays revoked. Keys that are not known there become good again, and are listed.
    """
    from sidecar.access.backup import restore as put

    location = _location(config, data)
    restored = asyncio.run(put(location, file, force, with_keys=not no_keys))
    if as_json:
        print_json(
            {
                "file": str(file),
                **asdict(restored.backup),
                "keys": restored.keys.restored,
                "brought_back": [_named(key) for key in restored.keys.brought_back],
                "stay_revoked": [_named(key) for key in restored.keys.stay_revoked],
                "stay_unread": list(restored.keys.stay_unread),
            }
        )
        return
    say(f"restored into {location}: {_held(restored.backup, restored.keys.restored)}")
    for line in _told(restored, time()):
        say(line)


def _location(path: Path | None, data: Path | None) -> StateLocation:
    from sidecar.access.backup import StateLocation

    config = resolve(path)
    if data is None and config.data_directory is not None:
        data = Path(config.data_directory)
    if data is None and config.state.url is None:
        raise CommandError("name the sidecar's configuration with --config, or its --data-directory", Exit.MISUSED)
    redis = None if config.state.url is None else config.state.location
    return StateLocation(None if data is None else data.expanduser(), redis)


def _held(summary: Summary, keys: int) -> str:
    usage = "with" if summary.has_usage else "without"
    held = ", ".join(
        count(number, thing)
        for number, thing in ((summary.adapters, "adapter"), (keys, "key"), (summary.limits, "limit"))
    )
    return f"{held}, {usage} usage"


def _told(restored: Restored, now: float) -> Iterator[str]:
    """Yield how old the backup is, and what an operator must know of its keys."""
    made_at = restored.backup.made_at
    made = datetime.fromtimestamp(made_at, UTC)
    yield f"the backup was made at {made:%Y-%m-%d %H:%M:%S} UTC, {_age(now - made_at)} ago"
    stay, back = restored.keys.stay_revoked, restored.keys.brought_back
    if stay:
        yield f"{count(len(stay), 'key')} revoked since, and still revoked:"
        yield from (f"  {key.id}  tenant {key.tenant}" for key in stay)
    if unread := restored.keys.stay_unread:
        yield (
            f"{count(len(unread), 'key')} whose entries there this release cannot read: they may be revoked, stay as "
            "they are, and are refused:"
        )
        yield from (f"  {key_id}" for key_id in unread)
    if back:
        yield f"{count(len(back), 'key')} good again, of which nothing here says whether they were revoked since:"
        yield from (f"  {key.id}  tenant {key.tenant}" for key in back)
        yield "revoke those that were, once a sidecar runs: sidecar keys revoke ID (--no-keys restores without any key)"


def _named(key: Key) -> dict[str, str]:
    return {"id": key.id, "tenant": key.tenant}


def _age(seconds: float) -> str:
    return duration(max(0.0, seconds)) if seconds < DAYS_FROM_S else f"{seconds / DAY_S:.0f} days"
