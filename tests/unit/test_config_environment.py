"""Keys that the environment sets, and what it says that is not meant for us."""

from __future__ import annotations

import pytest

from sidecar.config import Config, validated, written_in
from sidecar.errors import Misused

SERVICE_LINKS = {
    "LORA_SIDECAR_PORT": "tcp://10.0.0.7:9000",
    "LORA_SIDECAR_SERVICE_HOST": "10.0.0.7",
    "LORA_SIDECAR_SERVICE_PORT": "9000",
    "LORA_SIDECAR_SERVICE_PORT_GRPC": "9000",
    "LORA_SIDECAR_SERVICE_PORT_HTTP_METRICS": "9002",
    "LORA_SIDECAR_PORT_9000_TCP": "tcp://10.0.0.7:9000",
    "LORA_SIDECAR_PORT_9000_TCP_PROTO": "tcp",
    "LORA_SIDECAR_PORT_9000_TCP_PORT": "9000",
    "LORA_SIDECAR_PORT_9000_TCP_ADDR": "10.0.0.7",
}
"""Of a Service that is called lora-sidecar, in every pod of its namespace."""


def test_keys_are_set() -> None:
    """Two underscores step into a section, and values are YAML."""
    environment = {"LORA_SIDECAR_STORE__FETCHES_MAX": "7", "LORA_SIDECAR_HIDE_BACKEND": "true", "PATH": "/bin"}
    config = validated(written_in(None, environment))
    assert (config.store.fetches_max, config.hide_backend) == (7, True)


def test_a_service_of_our_name_sets_nothing() -> None:
    assert validated(written_in(None, SERVICE_LINKS)) == Config()
    assert validated(written_in(None, SERVICE_LINKS | {"LORA_SIDECAR_STORE__FETCHES_MAX": "7"})).store.fetches_max == 7


@pytest.mark.parametrize(
    "name",
    [
        "PORTS", "PORT_9000", "PORT_TCP", "PORT_9000_HTTP", "PORT_9000_TCP_NAME", "PORT__9000_TCP", "SERVICE",
        "SERVICE_HOSTS", "SERVICE_PORT__GRPC", "SERVICE_PORTS", "MY_SERVICE_HOST", "STORE__PORT", "LISTENERS__PORT",
        "port", "PORT\n",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_refused(name: str) -> None:
    """A key that is misspelt is told, whatever it looks like."""
    with pytest.raises(Misused, match=r"unknown key|valid dictionary"):
        validated(written_in(None, {f"LORA_SIDECAR_{name}": "1"}))
