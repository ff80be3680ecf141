"""Read keys from the environment: `LORA_SIDECAR_STORE__MEMORY_BYTES` is store.memory_bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

PREFIX = "LORA_SIDECAR_"
_SERVICE_LINK = re.compile(
    r"SERVICE_HOST|SERVICE_PORT(_[A-Z0-9]+)*|PORT|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)
"""Variables that Kubernetes sets in every pod of a namespace for a Service named lora-sidecar."""


def set_in(environment: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    """Yield the path and the value of each key that is set, in the order of the variables' names."""
    for name, text in sorted(environment.items()):
        key = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and _SERVICE_LINK.fullmatch(key) is None:
            yield key.lower().split("__"), yaml.safe_load(text)
