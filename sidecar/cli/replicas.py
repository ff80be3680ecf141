"""`sidecar replicas`: show the replicas and the backends that each owns."""

from __future__ import annotations

from typing import Any

from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import say
from sidecar.cli.show import AsJson, console, print_json, table
from sidecar.proto import admin_pb2 as pb


@admin_command
def list_replicas(client: Client, as_json: AsJson = False) -> None:
    """List the replicas that this one knows: the backends that each owns, and the leader."""
    replicas = client.ask(client.replicas.List, pb.ListReplicasRequest()).replicas
    if as_json:
        print_json(list(replicas))
    elif not replicas:
        say("one replica; several have a replicas.address and a state.url in their configuration")
    else:
        console().print(table(("REPLICA", "ADDRESS", "OWNS", ">WEIGHT", "DETAIL"), [_row(each) for each in replicas]))


def _row(replica: Any) -> tuple[str, ...]:
    owns = ", ".join(f"{each.backend} (epoch {each.epoch})" for each in replica.owns)
    said = ["asked"] if replica.self else []
    said += ["leads"] if replica.leads else []
    said += ["draining"] if replica.draining else []
    if replica.self and replica.forwards:
        said.append(f"forwarded {replica.forwards} requests, {replica.reroutes} of them again")
    return replica.id, replica.address, owns or "nothing", f"{replica.weight:g}", "; ".join(said)
