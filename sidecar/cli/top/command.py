"""The command `sidecar top`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.show import AsJson, print_json
from sidecar.cli.top.pages import PAGES
from sidecar.proto import admin_pb2 as pb

NAMES = ", ".join(page.name for page in PAGES)
ROWS_MAX = 500
"""The most rows that a sidecar sends."""


@admin_command
def top(
    client: Client,
    page: Annotated[str, typer.Option(help=f"The page to begin with: {NAMES}.")] = "queue",
    interval: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between updates.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the pool live: queue, engines and their slots, adapters, tenants, requests; keys cancel, pause, drain.

    The first line says what is wrong. "?" lists the keys. Of a large pool, updates come less often than asked for: a
    viewer takes at most 2 % of a core of the sidecar. With --json, each update is a line, with 500 rows at most.
    """
    view = next((each for each in PAGES if each.name == page), None)
    if view is None:
        raise CommandError(f'--page is "{page}"; it is one of {NAMES}', Exit.MISUSED)
    if as_json:
        request = pb.WatchPoolRequest(page=view.asked, interval_s=interval, limit=ROWS_MAX)
        for update in client.ask(client.pool.Watch, request, timeout_s=None):
            print_json(update, indent=None)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CommandError("top needs a terminal; with --json it prints a line of JSON an update", Exit.MISUSED)
    from sidecar.cli.top.app import Top  # the library for screens takes a fifth of a second to import

    app = Top(client, page, interval)
    app.run(mouse=False)  # ids can be marked and copied as elsewhere in the terminal
    if app.failure is not None:
        raise app.failure
