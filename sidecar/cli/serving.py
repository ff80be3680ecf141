"""`sidecar serve`: run a serving process configured by options, environment and file."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidecar.cli.endpoint import ENGINES
from sidecar.cli.exits import Exit
from sidecar.cli.listener import CLIENT_VARIABLES
from sidecar.cli.show import count
from sidecar.errors import Misused, Reason

if TYPE_CHECKING:
    from sidecar.config import Config

logger = logging.getLogger(__name__)

LISTENERS = "Listeners"
FILES_BESIDE = 1024
"""Files for engines, the registry, adapters being read, and connections beyond a listener's limit, which are closed."""
GRPC_VARIABLE, GRPC_POLLING = (
    "GRPC_EXPERIMENTS",
    "-event_engine_client,-event_engine_listener,-event_engine_callback_cq,-event_engine_for_all_other_endpoints",
)
"""Has gRPC read its sockets in the thread that takes its events, and not in four more that wake each other: a seventh
of a short answer's CPU. gRPC reads the variable when it is imported."""
CRASH_S = 6.0
"""How long a crashed process may take to end."""


def serve(
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).", show_default=False)] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help=f"An engine: {ENGINES}; repeatable.",
            show_default=False,
        ),
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folder; each PEFT subfolder becomes a name: adapters.serve.", show_default=False)
    ] = None,
    watch_config: Annotated[
        bool, typer.Option("--watch-config", help="Read the file again whenever it changes, as at SIGHUP.")
    ] = False,
    adapters_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder from which engines such as vLLM read adapters: PATH, or PATH:ENGINE_PATH.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data-directory", help="Directory for names, weights and journal.", show_default="in memory only"
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the configuration: store.memory_bytes=1000000000.", show_default=False),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            help="Address for requests by gRPC: listeners.data.",
            rich_help_panel=LISTENERS,
            show_default="127.0.0.1:9000",
        ),
    ] = None,
    admin: Annotated[
        str | None,
        typer.Option(
            help="Address for operators: listeners.admin.", rich_help_panel=LISTENERS, show_default="127.0.0.1:9001"
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            help="Address for the OpenAI API, which is at /v1 there: listeners.http.",
            rich_help_panel=LISTENERS,
            show_default="127.0.0.1:9002",
        ),
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            help="Address for health and metrics: listeners.probes.", rich_help_panel=LISTENERS, show_default="off"
        ),
    ] = None,
    admin_token_file: Annotated[
        str | None,
        typer.Option(help="File of operators' tokens, one per line.", rich_help_panel=LISTENERS, show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line, and errors, as JSON.")] = False,
) -> None:
    """Serve adapters in front of engines until SIGTERM, then finish running requests. Exit 70: the sidecar failed;
    restart it.

    Options override the environment (LORA_SIDECAR_STORE__MEMORY_BYTES), which overrides the file.
    """
    os.environ.setdefault(GRPC_VARIABLE, GRPC_POLLING)
    engines = "--backend" if adapters_dir is None else "--backend with --adapters-dir"
    options = {
        engines: ("backends", _backends(backend or [], adapters_dir)),
        "--adapters": ("adapters.serve", adapters),
        "--data-directory": ("data_directory", data),
        "--listen": ("listeners.data.address", listen),
        "--admin": ("listeners.admin.address", admin),
        "--http": ("listeners.http.address", http),
        "--probes": ("listeners.probes.address", probes),
        "--watch-config": ("watch_config", watch_config or None),
        "--admin-token-file": ("listeners.admin.token_file", admin_token_file),
    }
    if watch_config and config is None:
        raise Misused(Reason.CONFIG_INVALID, "--watch-config goes with --config, which names the file to watch")
    given = [(option, key, value) for option, (key, value) in options.items() if value is not None]
    given += _settings(setting or [])

    def read() -> Config:
        return resolve(config, given)

    try:
        _run(_serve(config, read, as_json))
    except Misused as error:
        error.message = _naming_options(error, options)
        raise


def _naming_options(error: Misused, options: Mapping[str, tuple[str, Any]]) -> str:
    """Return the message of an error about a key with the option that sets it: first if given, last as a way out."""
    for option, (key, value) in options.items():
        if key in error.message and not error.message.startswith(option):
            if value is not None:
                return f"{option}: {error.message}"
            if error.reason is Reason.PORT_IN_USE:
                return f"{error.message} or {option}"
    return error.message


def _backends(urls: list[str], adapters_dir: str | None) -> list[dict[str, Any]] | None:
    """Return the sections of engines given by URL. Raises Misused for a folder without an engine."""
    if adapters_dir is None:
        return [{"url": url} for url in urls] or None
    if not urls:
        raise Misused(
            Reason.CONFIG_INVALID, "--adapters-dir goes with --backend; a configuration file names it for each backend"
        )
    return [{"url": url, "adapters_dir": shared_folder(adapters_dir)} for url in urls]


def shared_folder(text: str) -> dict[str, str]:
    """Return a folder's section of the configuration, from PATH or PATH:ENGINE_PATH."""
    ours, _, engine = text.partition(":")
    ours = str(Path(ours).expanduser().absolute())
    return {"ours": ours, "engine": engine or ours}


def resolve(path: Path | None, options: Iterable[tuple[str, str, Any]] = ()) -> Config:
    """Return the configuration of a file, the environment and options: each its name, the dotted key and the value.

    Raises Misused naming where a wrong value is written.
    """
    from sidecar.backends.registry import entries_of
    from sidecar.config import validated, written_in
    from sidecar.config.sources import Setting, source_of

    settings = written_in(path, {name: text for name, text in os.environ.items() if name not in CLIENT_VARIABLES})
    settings += [Setting(tuple(key.split(".")), value, option) for option, key, value in options]
    config = validated(settings)
    entries_of(config, source_of(settings, ["backends"]))
    return config


def _settings(settings: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield what each --set says, for `resolve`. Raises Misused."""
    from sidecar.config.sources import data_of

    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise Misused(Reason.CONFIG_INVALID, f'--set wants key=value, and "{setting}" is not')
        option = f"--set {key}"
        yield option, key, data_of(text, option)


async def _serve(file: Path | None, read: Callable[[], Config], as_json: bool) -> None:
    from sidecar.serve.app import Sidecar
    from sidecar.serve.last_bound import LastBound
    from sidecar.serve.reloading import Source
    from sidecar.shell.crash import Crash
    from sidecar.shell.logs import configure_logging
    from sidecar.tasks import ended

    source = None if file is None else Source(file, read)
    config = read()
    logs = configure_logging(config.log_format)
    crash, bound = Crash(), LastBound(logs.stop)
    crash.within = lambda seconds: bound.within(seconds, Exit.FAILED)
    crash.then(lambda _: bound.within(CRASH_S, Exit.CRASHED))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request, URLs included
    open_files_for(config)
    try:
        sidecar = await Sidecar.start(config, crash=crash, source=source)
        _spare_collections()
        await sidecar.run_until_signalled(lambda: print(_ready(sidecar, config, as_json), flush=True))
    finally:
        await ended(*asyncio.all_tasks() - {asyncio.current_task()})
        logs.stop()


def open_files_for(config: Config) -> None:
    """Raise the limit of open files to one for each connection that the listeners may take, up to the hard limit.

    A process without a free file accepts no connection on any listener, not even probes.
    """
    listeners = config.listeners
    taken = (each.connections_max for each in (listeners.data, listeners.admin, listeners.http, listeners.probes))
    wanted = sum(taken) + FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "the process may open %d files and its listeners take connections for %d: raise the hard limit (ulimit "
            "-Hn, LimitNOFILE), or lower listeners.*.connections_max",
            hard,
            wanted,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spare_collections() -> None:
    """Exclude the objects of start-up from garbage collection: a full collection over all modules takes 40–80 ms,
    during which the event loop, and with it every stream, would stall.
    """
    gc.collect()
    gc.freeze()


def _ready(sidecar: Any, config: Config, as_json: bool) -> str:
    """Return the ready line, which the starter of this process waits for."""
    addresses = {
        "data": sidecar.data_address,
        "admin": sidecar.admin_address,
        "http": sidecar.http_address,
    }
    if sidecar.listening.probes:
        addresses["probes"] = sidecar.listening.probes
    if sidecar.listening.endpoint_picker:
        addresses["endpoint_picker"] = sidecar.listening.endpoint_picker
    backends, adapters = len(config.backends), len(sidecar.gateway.state.names)
    if as_json:
        return json.dumps({**addresses, "backends": backends, "adapters": adapters})
    probes = f", probes and metrics on {addresses['probes']}" if "probes" in addresses else ""
    picker = f", endpoint picker on {addresses['endpoint_picker']}" if "endpoint_picker" in addresses else ""
    return (
        f"ready: gRPC on {addresses['data']}, OpenAI's API on {addresses['http']}/v1, "
        f"admin on {addresses['admin']}{probes}{picker}; "
        f"{count(backends, 'backend')}, {count(adapters, 'adapter')}"
    )


def _run(serving: Any) -> None:
    """Run on uvloop if it is installed: it makes a message some tenths cheaper."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)
