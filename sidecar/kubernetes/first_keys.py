"""Make the first API keys of an installation: what the chart's Job runs before the pods start.

`python -m sidecar.kubernetes.first_keys --secret NAME` creates the Secret unless it is there. The Secret has
`keys.yaml`, the file of `identity.keys_file` with hashes only, and the two keys themselves as `operator` and
`application` for whoever hands them out. The Job may create Secrets and not read them: a Role cannot restrict `create`
to one name, and with `get` it could have the token of another account made and read it.

`--guard CONFIGMAP` refuses to go on if an installation runs there whose mode is not enforce. It is for values that set
no mode: tools that only render templates, as Argo CD, cannot tell an upgrade from an installation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from sidecar.access.keys import new_secret
from sidecar.config.sources import data_of
from sidecar.errors import Misused, Reason, SidecarError
from sidecar.kubernetes.access import find_access
from sidecar.kubernetes.api import Api, Collection
from sidecar.kubernetes.failures import CONFLICT, NOT_FOUND, ApiError

FILE = "keys.yaml"
CONFIGURATION = "config.yaml"
OWNERS: dict[str, dict[str, Any]] = {
    "operator": {"tenant": "operators", "roles": ["operator"], "note": "made at the installation, for operators"},
    "application": {"tenant": "default", "note": "made at the installation, for the first application"},
}
"""What each key is good for, by its name in the Secret."""


def secret_of(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return a Secret with new keys."""
    made = {owner: new_secret() for owner in OWNERS}
    listed = [fields | {"sha256": made[owner][2]} for owner, fields in OWNERS.items()]
    texts = {owner: secret for owner, (_, secret, _) in made.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": name, "labels": labels},
        "stringData": {FILE: yaml.safe_dump(listed, sort_keys=False)} | texts,
    }


async def guard(api: Api, config_map: str) -> None:
    """Raise Misused if a ConfigMap has the configuration of an installation whose mode is not enforce."""
    try:
        found = await api.get(f"{_core('configmaps', api).path}/{config_map}")
    except ApiError as error:
        if error.code == NOT_FOUND:
            return
        raise
    record = data_of((found.get("data") or {}).get(CONFIGURATION, ""), f"ConfigMap {config_map}")
    identity = record.get("identity") if isinstance(record, dict) else None
    mode = identity.get("mode", "off") if isinstance(identity, dict) else "off"
    if mode != "enforce":
        raise Misused(
            Reason.CONFIG_INVALID,
            f"this installation runs with identity.mode {mode} (ConfigMap {config_map}) and its values set no mode, so "
            "enforce would begin to refuse its clients: set identity.mode to observe, which counts and logs who would "
            "be denied, and later to enforce; off leaves all as it was",
        )


async def make(api: Api, secret: str, labels: dict[str, str]) -> bool:
    """Create the Secret; return False if there is one, which stays as it is."""
    try:
        await api.create(_core("secrets", api), secret_of(secret, labels))
    except ApiError as error:
        if error.code == CONFLICT:
            return False
        raise
    return True


def _core(plural: str, api: Api) -> Collection:
    return Collection("", "v1", plural, api.access.namespace)


async def run(secret: str, labels: dict[str, str], config_map: str) -> str:
    """Do what the options say and return what was done."""
    api = Api(find_access())
    try:
        if config_map:
            await guard(api, config_map)
        if not secret:
            return "nothing is there that enforce would surprise"
        made = await make(api, secret, labels)
    finally:
        await api.close()
    return (
        f"Secret {secret}: {'made, with a key for operators and one for an application' if made else 'there already'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sidecar.kubernetes.first_keys")
    parser.add_argument("--secret", default="", help="the Secret to create unless it is there")
    parser.add_argument("--labels", type=json.loads, default={}, help="its labels, as JSON")
    parser.add_argument("--guard", default="", help="the ConfigMap with the configuration of an earlier release")
    options = parser.parse_args(arguments)
    try:
        print(asyncio.run(run(options.secret, options.labels, options.guard)))
    except (ApiError, SidecarError) as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
