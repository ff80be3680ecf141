"""`sidecar state`: move the registry of names from one store to another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sidecar.cli.show import AsJson, count, print_json
from sidecar.config import redis_address
from sidecar.errors import Misused, Reason
from sidecar.state.contents import RegistryStore, SqliteFile, move
from sidecar.state.registry import REGISTRY_FILE

OF_REDIS = "The Redis"


def migrate(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A data directory, its registry.sqlite, or a URL.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Like FROM; a URL is redis://HOST:PORT/DB or similar.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the contents of TO.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check both and write nothing.")] = False,
    password_file: Annotated[
        Path | None, typer.Option(help="File with its password.", rich_help_panel=OF_REDIS, show_default=False)
    ] = None,
    key_prefix: Annotated[
        str, typer.Option(help="What its keys begin with.", rich_help_panel=OF_REDIS)
    ] = redis_address.KEY_PREFIX,
    ca: Annotated[
        Path | None, typer.Option(help="Authority that signed it (PEM).", rich_help_panel=OF_REDIS, show_default=False)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Our certificate (PEM).", rich_help_panel=OF_REDIS, show_default=False)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.", rich_help_panel=OF_REDIS, show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Copy all names, with their versions, pins and changes, from a file to Redis or back.

    No sidecar may run on either. FROM is not changed; watchers can continue with their tokens.
    """
    options = {
        "key_prefix": key_prefix,
        "password_file": password_file,
        "ca": ca,
        "certificate": certificate,
        "key": key,
    }
    with _bar("copying") as progress:
        contents = asyncio.run(
            move(
                _place(source, options, True),
                _place(target, options, False),
                force=force,
                dry_run=dry_run,
                progress=progress,
            )
        )
    names = len(contents.records)
    versions = sum(len(record.versions) for _, record in contents.records)
    if as_json:
        print_json(
            {
                "from": redis_address.without_users(source),
                "to": redis_address.without_users(target),
                "adapters": names,
                "versions": versions,
                "changes": len(contents.changes),
                "last_change": contents.last_change,
                "dry_run": dry_run,
            }
        )
        return
    done = "would copy" if dry_run else "copied"
    print(
        f"{done} {count(names, 'adapter')} with {count(versions, 'version')} and "
        f"{count(len(contents.changes), 'change')}; the last change is {contents.last_change}"
    )


def _place(text: str, options: dict[str, Any], is_there: bool) -> RegistryStore:
    """Return the store that an argument names. Raises Misused; the message never contains a password."""
    if "://" not in text:
        path = Path(text).expanduser()
        file = path / REGISTRY_FILE if path.is_dir() or not path.suffix else path
        if is_there and not file.is_file():
            raise Misused(Reason.CONFIG_INVALID, f"there is no registry {file}")
        return SqliteFile(file)
    from sidecar.state.redis.contents import RedisRegistryStore
    from sidecar.state.redis.link import Link

    try:
        found = redis_address.parse_address(text)
    except ValueError as error:
        raise Misused(Reason.CONFIG_INVALID, f"{redis_address.without_users(text)}: {error}") from error
    return RedisRegistryStore(Link(redis_address.RedisLocation(found, **options)))


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback (done, total) that draws a bar on stderr, if that is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
