"""Keys that the environment sets: `LORA_SIDECAR_STORE__MEMORY_BYTES` is store.memory_bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

PREFIX = "LORA_SIDECAR_"
_SERVICE_LINK = re.compile(
    r"SERVICE_HOST|SERVICE_PORT(_[A-Z0-9]+)*|PORT|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)
"""What Kubernetes tells every pod of a namespace about a Service that is called lora-sidecar."""


def set_in(environment: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    """Yield each key that is set, as the path of its sections and itself, with its value; by the variables' names."""
    for name, text in sorted(environment.items()):
        key = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and _SERVICE_LINK.fullmatch(key) is None:
            yield key.lower().split("__"), yaml.safe_load(text)
