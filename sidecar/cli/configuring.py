"""`sidecar config reload` and `sidecar config show`: the configuration of a running sidecar."""

from __future__ import annotations

import json

from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.show import AsJson, print_json
from sidecar.proto import admin_pb2 as pb


@admin_command
def reload(client: Client, as_json: AsJson = False) -> None:
    """Have a running sidecar read its configuration file again, and print the keys that have changed.

    All changes or none: a faulty file, or a change that needs a restart, changes nothing. SIGHUP does the same.
    """
    answer = client.ask(client.configuration.Reload, pb.ReloadRequest(), timeout_s=None)
    if as_json:
        print_json(answer)
    elif answer.changed:
        print("\n".join(f"changed: {key}" for key in answer.changed))
    else:
        print("nothing has changed")


@admin_command
def show(client: Client, as_json: AsJson = False) -> None:
    """Print the configuration that a running sidecar has in force, defaults included."""
    import yaml

    record = json.loads(client.ask(client.configuration.Get, pb.GetConfigurationRequest()).json)
    if as_json:
        print_json(record)
    else:
        print(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), end="")
