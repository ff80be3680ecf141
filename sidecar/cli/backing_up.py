"""`sidecar state backup` and `restore`: the shared state in one file."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.serving import resolve
from sidecar.cli.show import AsJson, count, print_json, size

if TYPE_CHECKING:
    from sidecar.access.backup import StateLocation, Summary

File = Annotated[Path, typer.Argument(help="The backup.", show_default=False)]
Configuration = Annotated[
    Path | None, typer.Option("--config", help="The sidecar's configuration.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option("--data-dir", "--data", help="Its data directory.", show_default="the configuration's"),
]


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
    _print(summary, file, f"{file}: {size(file.stat().st_size)} from {location} with", as_json)


def restore(
    file: File,
    config: Configuration = None,
    data: Data = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the state that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup into the data directory, or into the configuration's Redis. No sidecar may run on them."""
    from sidecar.access.backup import restore as put

    location = _location(config, data)
    _print(asyncio.run(put(location, file, force)), file, f"restored into {location}:", as_json)


def _location(path: Path | None, data: Path | None) -> StateLocation:
    from sidecar.access.backup import StateLocation

    config = resolve(path)
    if data is None and config.data_directory is not None:
        data = Path(config.data_directory)
    if data is None and config.state.url is None:
        raise CommandError("name the sidecar's configuration with --config, or its --data-dir", Exit.MISUSED)
    redis = None if config.state.url is None else config.state.location
    return StateLocation(None if data is None else data.expanduser(), redis)


def _print(summary: Summary, file: Path, begins: str, as_json: bool) -> None:
    if as_json:
        print_json({"file": str(file), **asdict(summary)})
        return
    usage = "with" if summary.has_usage else "without"
    held = ", ".join(
        count(number, thing)
        for number, thing in ((summary.adapters, "adapter"), (summary.keys, "key"), (summary.limits, "limit"))
    )
    print(f"{begins} {held}, {usage} usage")
