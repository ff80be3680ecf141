"""Commands for incidents: `debug capture` writes one, `replay` replays a journal and explains a request."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidecar.cli.durations import seconds_in
from sidecar.cli.endpoint import PANEL
from sidecar.cli.exits import CommandError, Exit, harmless
from sidecar.cli.listener import CA_VARIABLE
from sidecar.cli.serving import resolve
from sidecar.cli.show import WHICH, AsJson, JournalPolicies, bar, count, print_json, size
from sidecar.errors import Misused, Reason

if TYPE_CHECKING:
    from sidecar.config import Config


def capture(
    last: Annotated[str, typer.Option(help="How much of the journal's end to include: 30s, 10m, 2h.")] = "10m",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write.", show_default="incident-TIME.tgz")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The sidecar's configuration file.", show_default=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data-directory", help="Its data directory.", show_default="the configuration's"),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(help="Address of the listener that serves the metrics.", show_default="the configuration's"),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            envvar=CA_VARIABLE,
            help="PEM file of the CA that signed this listener, if it speaks TLS.",
            rich_help_panel=PANEL,
            show_default="this machine's CAs",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="PEM file of our own certificate.", rich_help_panel=PANEL)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of our own key.", rich_help_panel=PANEL)] = None,
    redact_ids: Annotated[bool, typer.Option("--redact-ids", help="Remove clients' request ids.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write journal, redacted configuration, engines' configs, metrics and versions into one file; never a prompt.

    The sidecar may be running or dead. The file's manifest lists missing parts with the reasons.
    """
    from sidecar.incident.capture import capture as write

    out = out or Path(f"incident-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tgz")
    files = (("ca", ca), ("certificate", certificate), ("key", key))
    tls = {name: str(path) for name, path in files if path is not None}
    wanted = replace(
        _wanted(timedelta(seconds=seconds_in(last, "--last")), config, data, http, tls), redact_ids=redact_ids
    )
    with bar(f"writing {out}") as progress:
        manifest = write(wanted, out, progress)
    if as_json:
        print_json({"path": str(out), **manifest})
        return
    print(_captured(out, manifest))
    for item in manifest["missing"]:
        print(f"left out: {item['what']}: {item['why']}", file=sys.stderr)


def _wanted(last: timedelta, path: Path | None, data: Path | None, http: str | None, tls: dict[str, str]) -> Any:
    """Return what to capture; sources that are not named come from the configuration, and that from the environment."""
    from sidecar.config import Config
    from sidecar.incident.capture import Wanted
    from sidecar.incident.parts import HttpListener, http_address

    config, why_not = _configuration(path, data)
    if data is None and config is not None and config.data_directory is not None:
        data = Path(config.data_directory).expanduser()
    if data is None:
        why_not += (
            ("journal", "no data directory is known, and without one there is no journal; see --data-directory"),
        )
    if data is not None and not data.is_dir():
        raise Misused(
            Reason.CONFIG_INVALID, f"there is no data directory {data}; name the sidecar's with --data-directory"
        )
    listeners = (config or Config()).listeners
    listener = listeners.http if listeners.probes.address is None else listeners.probes
    speaks_tls = bool(tls) if config is None else listener.tls is not None
    asks_back = listener.tls is not None and listener.tls.ca is not None
    address = HttpListener(http_address(http or listener.address or ""), tls if speaks_tls else None, asks_back)
    return Wanted(last, data, config, address, why_not)


def _configuration(path: Path | None, data: Path | None) -> tuple[Config | None, tuple[tuple[str, str], ...]]:
    from sidecar.config import Config
    from sidecar.incident.parts import why_broken

    try:
        config = resolve(path)
    except Misused as error:
        if path is not None and not path.exists():
            raise
        return None, (("config", why_broken(error)),)  # a broken configuration may be the incident
    if path is None and config == Config():
        if data is None:
            raise CommandError("name the sidecar's configuration with --config, or its --data-directory", Exit.MISUSED)
        return None, (("config", "no file was named with --config, and the environment sets nothing"),)
    return config, ()


def _captured(out: Path, manifest: dict[str, Any]) -> str:
    covers, segments = manifest["covers"], manifest["journal"]
    journal = f"journal from {covers['from']} to {covers['to']}" if segments else "no journal"
    files = count(len(segments) + len(manifest["files"]) + 1, "file")
    return f"{out}: {size(out.stat().st_size)}, {files}, {journal}; it holds {manifest['holds']}"


def replay(
    path: Annotated[
        Path,
        typer.Argument(help="A journal segment, a journal, a data directory, or an incident.", show_default=False),
    ],
    effects: Annotated[bool, typer.Option("--effects", help="Print each step's effects, one JSON line each.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help=f"Explain what a request waited for, moment by moment. {WHICH}",
            show_default=False,
        ),
    ] = None,
    policy: JournalPolicies = None,
    as_json: AsJson = False,
) -> int:
    """Replay a journal; exit 1 if any step gives other effects than the recorded ones."""
    from sidecar.journal import replay as replaying

    if explain is None:
        write = print if effects or as_json else lambda line: print(harmless(line))
        return replaying.run(
            path, effects, as_json, write, lambda line: print(harmless(line), file=sys.stderr), policy or ()
        )
    if effects:
        raise CommandError("--effects and --explain are two questions; ask one of them", Exit.MISUSED)
    return _explain(path, explain, policy or [], as_json)


def _explain(path: Path, request: str, policies: list[str], as_json: bool) -> int:
    from sidecar.incident.explain import explain
    from sidecar.telling.wording import lines_of, record_of

    with bar(f"replaying {path}") as progress:
        timeline = explain(path, request, progress, policies)
    if as_json:
        print_json(record_of(timeline))
    else:
        print(harmless("\n".join(lines_of(timeline))))
    return Exit.OK
