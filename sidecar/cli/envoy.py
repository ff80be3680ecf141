"""`sidecar envoy config`: Envoy's configuration for the lane in which Envoy carries the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
import yaml

from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.serving import resolve
from sidecar.cli.show import AsJson, print_json
from sidecar.config.listeners import DataListener, is_local
from sidecar.config.section import is_address

EVERYWHERE = ("0.0.0.0", "[::]")
Port = Annotated[int, typer.Option("--port", metavar="N", min=1, max=65_535, help="Envoy's port for clients.")]


def print_config(
    file: Annotated[Path, typer.Argument(help="Configuration file (YAML) of the sidecar.", show_default=False)],
    port: Port = 8080,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Envoy's address for clients and probes.")
    ] = "0.0.0.0",
    pickers: Annotated[
        list[str] | None,
        typer.Option(
            "--picker",
            metavar="HOST:PORT",
            help="Where Envoy reaches the endpoint picker; by default the address of the file, from the same machine. "
            "Give it for each replica.",
            show_default=False,
        ),
    ] = None,
    ca: Annotated[
        str | None,
        typer.Option("--ca", metavar="PATH", help="Certificate, on Envoy's machine, of a picker with TLS."),
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option("--admin-port", metavar="N", help="Port of Envoy's administration, on loopback.")
    ] = None,
    ready_port: Annotated[
        int | None,
        typer.Option(
            "--ready-port",
            metavar="N",
            min=1,
            max=65_535,
            help="Port of /ready and /live, for probes from outside; needs --admin-port.",
        ),
    ] = None,
    kserve: Annotated[
        bool,
        typer.Option("--kserve", help="Have Envoy carry KServe's inference calls, too."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print Envoy's configuration for a sidecar that picks engines for it.

    It is a bootstrap for `envoy -c`. Every HTTP request of Envoy's clients asks the sidecar where it goes. Answers
    pass Envoy only, and its access log tells the sidecar how they ended. gRPC calls go to the data listener, but for
    KServe's inference calls with --kserve. Of several replicas Envoy leaves out those that fail its health checks.
    """
    from sidecar.fronts.extproc.bootstrap import bootstrap

    try:
        ip_address(host)
    except ValueError as error:
        message = (
            f"--host {host}: Envoy listens at an IP address only, as 127.0.0.1 or 0.0.0.0; it looks up no name there"
        )
        raise CommandError(message, Exit.MISUSED) from error
    listeners = resolve(file).listeners
    listener = listeners.endpoint_picker
    if listener.address is None:
        raise CommandError(
            f"{file} has no endpoint picker: set listeners.endpoint_picker.address, as 127.0.0.1:9004", Exit.MISUSED
        )
    if listener.address.startswith("unix:") and not pickers:
        raise CommandError(
            "name the endpoint picker's HOST:PORT with --picker: it listens on a socket file", Exit.MISUSED
        )
    listens, _, number = listener.address.rpartition(":")
    places = pickers or [f"{'127.0.0.1' if listens in EVERYWHERE else listens}:{number}"]
    if (wrong := next((each for each in places if not is_address(each)), None)) is not None:
        raise CommandError(f"--picker {wrong}: it must be HOST:PORT, as 10.0.0.7:9004", Exit.MISUSED)
    if (listener.tls is None) != (ca is None):
        missing = "give --ca: the endpoint picker has TLS" if ca is None else "leave out --ca: the picker has no TLS"
        raise CommandError(missing, Exit.MISUSED)
    if ready_port is not None and admin_port is None:
        raise CommandError("give --admin-port with --ready-port: /ready asks Envoy's administration", Exit.MISUSED)
    record = bootstrap(
        port, places, picker_ca=ca, admin_port=admin_port, host=host, ready_port=ready_port,
        data=_data_listeners(listeners.data, places), data_calls_max=listeners.data.calls_per_connection_max,
        calls_max=listener.calls_per_connection_max, carries_calls=kserve,
    )  # fmt: skip
    if as_json:
        print_json(record)
    else:
        print(yaml.safe_dump(record, sort_keys=False), end="")


def _data_listeners(listener: DataListener, pickers: Sequence[str]) -> list[str]:
    """Return where Envoy reaches the data listeners, which are on the pickers' machines; none if it cannot."""
    host, _, port = listener.address.rpartition(":")
    if listener.tls is not None or listener.address.startswith("unix:"):
        return []
    if is_local(listener.address) and not all(map(is_local, pickers)):
        return []
    hosts = [picker.rpartition(":")[0] for picker in pickers] if host in EVERYWHERE else [host]
    return [f"{each}:{port}" for each in dict.fromkeys(hosts)]
