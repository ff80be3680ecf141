"""Commands that check before anything runs: `config check`, `policies check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from policies.registry import POLICIES
from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.serving import resolve
from sidecar.cli.show import AsJson, print_json, working
from sidecar.errors import Misused, Reason

if TYPE_CHECKING:
    from sidecar.config import Config
    from sidecar.config.backends import Backend as Entry

CONTEXT_TOKENS = 1024
"""The context length in tokens for which a calibrated pace is printed."""

NO_BACKENDS = (
    "backends is empty: requests are refused until sidecar backends add names an engine, and a running sidecar that "
    "has engines does not take it"
)
MARKS = {"eviction": "victims", "ordering": "choose", "routing": "pick", "prefetch": "advise"}
"""The method that only this kind of policy has."""


def check_config(
    file: Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)],
    connect: Annotated[
        bool, typer.Option("--connect", help="Check the engines themselves instead, all of them at the same time.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Print the effective configuration, defaults and environment included; exit 2 with the fault.

    It reads files of keys and policies, too. With --connect, check each engine, as `backends check URL` does; exit 1
    if a check fails.
    """
    from sidecar.access import configured
    from sidecar.access.configured import policy_of
    from sidecar.backends.registry import entries_of, full_record
    from sidecar.serve.listening import chat_templates
    from sidecar.serve.served_folders import missing_roots
    from sidecar.serve.telemetry import check_extra

    config = resolve(file)
    policy_of(config.access.policies)
    check_extra(config.otlp)
    entries = entries_of(config)
    _check_files(config, entries)
    chat_templates(entries)
    _check_addresses(entries)
    lacking = [] if entries else [NO_BACKENDS]
    notes = [*lacking, *missing_roots(config.adapters), *configured.check(config)]
    notes += [*_paces(entries), *_undeclared(entries)]
    if connect:
        from sidecar.cli.probing import check_all

        return check_all(config, as_json)
    record = full_record(config)
    if as_json:
        print_json(record)
        print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    else:
        print(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), end="")
        print("".join(f"# {note}\n" for note in notes), end="")
    return Exit.OK


def _paces(entries: Sequence[Entry]) -> Iterator[str]:
    """Return for each backend what its wait promises will rest on. Raises Misused for a faulty cost file."""
    from sidecar.serve.pool import facts_of

    facts = facts_of(entries)
    for backend in entries:
        pace = facts[backend.identity].pace
        if pace is None:
            yield (
                f"{backend.identity}: its pace is a guess until it is learned from its runs; "
                "backends[].engine.cost names a cost file"
            )
        else:
            seat_ns = pace.seat_ns + pace.context_token_ns * CONTEXT_TOKENS
            yield (
                f"{backend.identity}: its pace is calibrated from {backend.engine.cost}: a step takes "
                f"{pace.fixed_ns / 1e6:.3g} ms and {seat_ns / 1e6:.3g} ms for each request of {CONTEXT_TOKENS} tokens"
            )


def _undeclared(entries: Sequence[Entry]) -> Iterator[str]:
    """Return for each backend the settings that its kind needs and the configuration omits."""
    from sidecar.backends.registry import kind_named
    from sidecar.serve.pool import facts_of

    facts = facts_of(entries)
    for backend in entries:
        for note in kind_named(backend.kind_name).notes(backend, facts[backend.identity]):
            yield f"{backend.identity}: {note}"


def _check_addresses(entries: Sequence[Entry]) -> None:
    """Raise Misused for a backend whose address stands for several engines, by DNS or in the cluster."""
    from sidecar.discovery import several
    from sidecar.kubernetes import services

    places = {
        f"backends.{number}.url": backend.address for number, backend in enumerate(entries) if backend.discover is None
    }
    for key, problem in (several.problems(places) or services.problems(places)).items():
        raise Misused(Reason.CONFIG_INVALID, f"{key}: {problem}")


def _check_files(config: Config, entries: Sequence[Entry]) -> None:
    """Raise Misused for the first file that the configuration names and that does not exist."""
    for key, path in _files(config, entries):
        if not Path(path).expanduser().is_file():
            raise Misused(Reason.CONFIG_INVALID, f"{key}: there is no file {path}")
    serve = config.adapters.serve
    if serve is not None and not Path(serve).expanduser().is_dir():
        raise Misused(Reason.CONFIG_INVALID, f"adapters.serve: there is no folder {serve}")


def _files(config: Config, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    listeners = config.listeners
    named: list[tuple[str, str | None]] = [("listeners.admin.token_file", listeners.admin.token_file)]
    named.append(("state.password_file", config.state.password_file))
    secured: list[tuple[str, Any]] = [
        ("replicas.tls", config.replicas.tls),
        ("state.tls", config.state.tls),
        ("listeners.data.tls", listeners.data.tls),
        ("listeners.admin.tls", listeners.admin.tls),
        ("listeners.http.tls", listeners.http.tls),
        ("listeners.probes.tls", listeners.probes.tls),
    ]
    for number, backend in enumerate(entries):
        named += [(f"backends.{number}.{key}", path) for key, path in backend.files().items()]
        secured.append((f"backends.{number}.tls", backend.tls))
    for key, tls in secured:
        if tls is not None:
            named += [(f"{key}.{name}", path) for name, path in tls.model_dump().items()]
    return [(key, path) for key, path in named if path is not None]


def check_policy(
    name: Annotated[
        str, typer.Argument(help="lru, eviction.lru, a plug-in's name, or package.module:Class.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Check a policy for conformance, purity and a golden trace."""
    from sidecar.lab import conformance

    kind, cls = find_policy(name)
    try:
        with working(f"checking {name}"):
            checks = list(conformance.check(kind, cls))
    except AssertionError as error:
        problem = str(error) or "a check failed"
        raise CommandError(f'the {kind} policy "{name}" does not conform: {problem}', kind=kind) from error
    if as_json:
        print_json({"policy": name, "kind": kind, "checks": checks})
        return
    for check in checks:
        print(f"ok  {check}")
    print(f"{kind} {name}: {len(checks)} checks passed")


def find_policy(name: str) -> tuple[str, type[Any]]:
    """Return a policy's kind and class. Raises Misused, or CommandError if the name is ambiguous."""
    from sidecar.config import plugins

    if ":" in name:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: find a policy in the current directory
        cls = plugins.resolve("policy", name)
        kinds = [kind for kind, mark in MARKS.items() if hasattr(cls, mark)]
        if not kinds:
            methods = ", ".join(f"{mark} ({kind})" for kind, mark in MARKS.items())
            raise CommandError(f"{name} is no policy: it has none of {methods}", Exit.MISUSED)
        return kinds[0], cls
    kind, _, short = name.partition(".")
    if kind in POLICIES and short:
        return kind, plugins.resolve(kind, short)
    kinds = [kind for kind in POLICIES if name in plugins.known(kind)]
    if len(kinds) == 1:
        return kinds[0], plugins.resolve(kinds[0], name)
    known = [f"{kind}.{each}" for kind in POLICIES for each in sorted(plugins.known(kind))]
    problem = f'"{name}" could be several' if kinds else f'no policy is called "{name}"'
    raise CommandError(f"{problem}; there are {', '.join(known)}", Exit.MISUSED)
