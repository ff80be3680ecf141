"""`sidecar state migrate`: move the state from one store to another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar.cli.exits import say
from sidecar.cli.show import AsJson, count, print_json, working
from sidecar.config import redis_address
from sidecar.errors import Misused, Reason
from sidecar.state.registry import REGISTRY_FILE

if TYPE_CHECKING:
    from sidecar.access.backup import StateLocation

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
    """Copy names, API keys, limits and what budgets have taken, from a data directory to a Redis or back.

    No sidecar may run on either. FROM is not changed; watchers can continue with their tokens. What stays is listed.
    """
    from sidecar.access.backup import migrate as move

    reached = partial(
        redis_address.RedisLocation,
        key_prefix=key_prefix, password_file=password_file, ca=ca, certificate=certificate, key=key,
    )  # fmt: skip
    from_, to = _place(source, reached, True), _place(target, reached, False)
    with working("copying"):
        copied = asyncio.run(move(from_, to, force, dry_run))
    if as_json:
        places = {"from": redis_address.without_users(source), "to": redis_address.without_users(target)}
        print_json({**places, **copied, "dry_run": dry_run})
        return
    done = "would copy" if dry_run else "copied"
    say(
        f"{done} {count(copied['adapters'], 'adapter')} with {count(copied['versions'], 'version')} and "
        f"{count(copied['changes'], 'change')}; the last change is {copied['last_change']}\n"
        f"{done} {count(copied['keys'], 'key')} and the last use of {copied['uses']}, "
        f"{count(copied['limits'], 'limit')}, and what is taken of {count(copied['budgets'], 'budget')}"
    )
    if copied["stay_revoked"]:
        say(f"revoked there, and still revoked: {', '.join(copied['stay_revoked'])}")
    if copied["unread"]:
        say(f"copied as they are, though this release cannot read them: {', '.join(copied['unread'])}")
    for left in copied["left"]:
        say(f"not copied: {left['what']} ({', '.join(left['places'])}): {left['why']}")


def _place(
    text: str, reached: Callable[[redis_address.Address], redis_address.RedisLocation], is_there: bool
) -> StateLocation:
    """Return the place that an argument names. Raises Misused; the message never contains a password."""
    from sidecar.access.backup import StateLocation

    if "://" in text:
        try:
            found = redis_address.parse_address(text)
        except ValueError as error:
            raise Misused(Reason.CONFIG_INVALID, f"{redis_address.without_users(text)}: {error}") from error
        return StateLocation(None, reached(found))
    path = Path(text).expanduser()
    folder = path.parent if path.name == REGISTRY_FILE else path
    if is_there and not (folder / REGISTRY_FILE).is_file():
        raise Misused(Reason.CONFIG_INVALID, f"there is no registry {folder / REGISTRY_FILE}")
    if folder.exists() and not folder.is_dir():
        raise Misused(Reason.CONFIG_INVALID, f"{folder} is no data directory, nor the {REGISTRY_FILE} in one")
    return StateLocation(folder)
