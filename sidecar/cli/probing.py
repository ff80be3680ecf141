"""`sidecar backends check URL` and `config check --connect`: check live engines without a running sidecar."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.backends.checking import check, names_of
from sidecar.backends.checks.finding import State, Target, failed, skipped
from sidecar.backends.kind import Checks
from sidecar.backends.registry import KINDS, entries_of, kind_named, urls
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.findings import Lines, Report, drawn
from sidecar.cli.serving import resolve, shared_folder
from sidecar.cli.show import console, print_json, working
from sidecar.config import Config, parse
from sidecar.config.backends import Backend
from sidecar.config.section import is_address
from sidecar.core.facts import Adapter
from sidecar.errors import Invalid, Misused
from sidecar.serve.discovered import found_now
from sidecar.serve.pool import base_model_of, facts_of

SHOWN_MAX = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """The command line's settings for one engine; each overrides the configuration's."""

    config: Path | None = None
    model: str | None = None
    metrics: str | None = None
    engine_config: Path | None = None
    dtype: str | None = None
    base_model: Path | None = None
    adapters: Path | None = None
    tls: dict[str, str] | None = None
    adapters_dir: str | None = None
    api_key_file: Path | None = None

    def applied_to(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a backend's section of the configuration with these settings."""
        engine = {"config": _text(self.engine_config), "dtype": self.dtype}
        engine = {key: value for key, value in engine.items() if value is not None}
        given = {
            "model": self.model,
            "metrics": self.metrics,
            "tls": self.tls or None,
            "adapters_dir": None if self.adapters_dir is None else shared_folder(self.adapters_dir),
            "api_key_file": _text(self.api_key_file),
        }
        record = record | {key: value for key, value in given.items() if value is not None}
        if engine:
            record["engine"] = record.get("engine", {}) | engine
        if self.base_model is not None:
            base = record.get("base_model") or {}
            base = {"name": base} if isinstance(base, str) else base
            record["base_model"] = {"name": str(self.base_model)} | base | {"config": str(self.base_model)}
        return record


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def check_url(url: str, wanted: Wanted, as_json: bool) -> Exit:
    """Check the engine at a URL, or the configured backend of that id or URL; print a line for each check."""
    config = Config() if wanted.config is None else resolve(wanted.config)
    record = wanted.applied_to(_record(url, config, wanted.config))
    (backend,) = entries_of(parse({"backends": [record]}, "the command line"), "the command line")
    if _checks_of(backend) is None:
        checked = urls(lambda kind: kind.checks is not None)
        why = f"{backend.url}: engines of its kind cannot be checked; those behind {checked} can"
        raise CommandError(why, Exit.MISUSED)

    served = _served(wanted.adapters or config.adapters.serve)
    target = _target(backend, None if wanted.config is None else config, served)
    report = Report(target.id, backend.url)
    asyncio.run(_unless_told_to_end(_show(target, report, as_json)))
    if as_json:
        print_json(report.record())
    return Exit.FAILED if report.result is State.FAILED else Exit.OK


def _record(url: str, config: Config, file: Path | None) -> dict[str, Any]:
    """Return the section of the chosen backend; without a configuration, a section with the URL only."""
    full = url if "://" in url else f"{next(iter(KINDS))}://{url}"
    if file is None:
        if not is_address(full.partition("://")[2]):
            why = f'"{url}" is no URL of an engine; to name a backend by its id, give its file, --config FILE'
            raise CommandError(why, Exit.MISUSED)
        return {"url": full}
    entries = entries_of(config, str(file))
    found = [number for number, entry in enumerate(entries) if url == entry.identity or full == entry.url]
    if not found:
        known = ", ".join(entry.identity for entry in entries[:SHOWN_MAX]) or "none"
        raise CommandError(f'{file} has no backend "{url}"; it has {known}', Exit.MISUSED)
    if entries[found[0]].discover is not None:
        raise CommandError(f'{url} is a pool; "sidecar config check --connect {file}" looks at all in it', Exit.MISUSED)
    return config.backends[found[0]]


def _target(backend: Backend, config: Config | None, served: tuple[Adapter, ...]) -> Target:
    facts = facts_of([backend])[backend.identity]
    return Target(
        id=backend.identity,
        address=backend.address,
        facts=facts,
        tls=backend.tls_files,
        store_bytes=None if config is None else config.store.memory_bytes,
        adapters_dir=backend.shared_dir,
        base=base_model_of(backend),
        served=served,
        **(checks.target(backend) if (checks := _checks_of(backend)) is not None else {}),
    )


def _checks_of(backend: Backend) -> Checks | None:
    checks = kind_named(backend.kind_name).checks
    return None if checks is None else checks()


def _served(folder: str | Path | None) -> tuple[Adapter, ...]:
    """Read the shapes of the adapters in a folder; a faulty one is reported on stderr and left out."""
    if folder is None:
        return ()
    found = []
    with working(f"reading the adapters in {folder}"):
        for path in sorted(Path(folder).expanduser().iterdir()):
            if not (path / "adapter_config.json").is_file():
                continue
            try:
                with read_adapter(path) as source:
                    found.append(adapter_of(source))
            except Invalid as error:
                say(f"not counted: {error.message}", error=True)
    return tuple(found)


async def _unless_told_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Await the checks; if SIGTERM or Ctrl-C ends them, unload the adapters that they loaded."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        raise CommandError("interrupted before all checks were done", Exit.INTERRUPTED) from None


async def _show(target: Target, report: Report, as_json: bool) -> None:
    out = console()
    lines = None if as_json else Lines(out)
    with _spinner(out, as_json) as begun:
        async with aclosing(check(target, begun)) as findings:
            async for finding in findings:
                report.findings.append(finding)
                if lines is not None:
                    lines.show(finding)
    if lines is not None:
        lines.flush()
        out.print(f"\n{target.id}: {report.summary()}")


@contextmanager
def _spinner(out: Console, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the running check, on a terminal."""
    if quiet or not out.is_terminal:
        yield lambda name: None
        return
    with out.status("") as status:
        yield lambda name: status.update(f"{name} …")


def check_all(config: Config, as_json: bool) -> Exit:
    """Check all backends of a configuration concurrently; print the problems, and a line for each backend."""
    if not config.backends:
        raise CommandError("no backend is configured: there is nothing to connect to", Exit.MISUSED)
    served = _served(config.adapters.serve)
    reports = asyncio.run(_unless_told_to_end(_look_at_all(config, served)))
    if as_json:
        print_json({"backends": [report.record() for report in reports]})
    else:
        out = console()
        for part in drawn(reports):
            out.print(part)
    return Exit.FAILED if any(report.result is State.FAILED for report in reports) else Exit.OK


async def _look_at_all(config: Config, served: tuple[Adapter, ...]) -> list[Report]:
    entries = entries_of(config)
    pools = [entry for entry in entries if entry.discover is not None]
    names = [pool.identity for pool in pools]
    found = dict(zip(names, await asyncio.gather(*map(found_now, pools)), strict=True))
    engines = [each for entry in entries for each in found.get(entry.identity, [entry])]
    with _bars() as bar:
        reports = await asyncio.gather(*(_look(backend, config, served, bar(backend)) for backend in engines))
    return [*reports, *(_empty(pool) for pool in pools if not found[pool.identity])]


def _empty(pool: Backend) -> Report:
    """Return the report of a pool in which no engine was found."""
    assert pool.discover is not None
    report = Report(pool.identity, pool.discover.name)
    report.findings.append(failed(f"no engine was found by {pool.discover.name}", "is it the name that it has there?"))
    return report


async def _look(backend: Backend, config: Config, served: tuple[Adapter, ...], begun: Callable[[str], None]) -> Report:
    report = Report(backend.identity, backend.url)
    if _checks_of(backend) is None:
        report.findings.append(skipped(f'there are no checks for the kind "{backend.kind_name}"'))
        return report
    try:
        async with aclosing(check(_target(backend, config, served), begun)) as findings:
            async for finding in findings:
                report.findings.append(finding)
    except Misused as error:
        raise CommandError(f"{backend.identity}: {error.message}", Exit.MISUSED, error.reason.value) from error
    begun("done")
    return report


@contextmanager
def _bars() -> Iterator[Callable[[Backend], Callable[[str], None]]]:
    """Yield a function that makes a progress callback for each backend: a bar on stderr, if that is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.fields[backend]}", markup=False), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:

        def bar(backend: Backend) -> Callable[[str], None]:
            total = len(names_of(facts_of([backend])[backend.identity].kind))
            task = progress.add_task("", total=total, backend=backend.identity)

            def begun(name: str) -> None:
                progress.update(task, advance=1, description=name)

            return begun

        yield bar
