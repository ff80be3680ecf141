"""Load calls replace adapters, so the configuration allows them only where no stranger comes in."""

from __future__ import annotations

import pytest

from sidecar.config import parse
from sidecar.config.openai import LOADS
from sidecar.errors import Misused, Reason

LOADS_ON = {"load_calls": True}
ROOT = {"adapters": {"roots": ["/steps"]}}
TLS = {"certificate": "server.pem", "key": "server.key"}


@pytest.mark.parametrize(
    "http", [{"address": "0.0.0.0:9002"}, {"address": "10.0.0.7:9002"}, {"address": "[::]:9002", "tls": TLS}]
)
def test_load_calls_are_refused_where_other_machines_come_in_without_a_certificate(http: dict[str, object]) -> None:
    with pytest.raises(
        Misused, match=r"let it listen on 127\.0\.0\.1, or set listeners.http.tls with a client ca"
    ) as caught:
        parse({"openai": LOADS_ON, "listeners": {"http": http}}, "the test")
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "openai: load_calls lets whoever reaches listeners.http" in caught.value.message


@pytest.mark.parametrize(
    "http",
    [
        {},
        {"address": "127.0.0.1:9002"},
        {"address": "[::1]:9002"},
        {"address": "localhost:0"},
        {"address": "0.0.0.0:9002", "tls": TLS | {"ca": "clients.pem"}},
    ],
)
def test_load_calls_are_allowed_on_loopback_and_for_clients_with_certificates(http: dict[str, object]) -> None:
    assert parse(ROOT | {"openai": LOADS_ON, "listeners": {"http": http}}, "the test").openai.load_calls


def test_the_class_of_loads_is_there_only_with_them_and_can_be_set() -> None:
    local = ROOT | {"listeners": {"http": {"address": "127.0.0.1:0"}}}
    assert LOADS not in parse(local, "the test").core().classes
    core = parse(local | {"openai": LOADS_ON}, "the test").core()
    assert (core.classes[LOADS].queue_wait_ns_max, core.classes[LOADS].patience_ns) == (300_000_000_000, 0)
    queue = {"classes": {LOADS: {"queue_wait_s_max": 7, "patience_s": 2}}}
    core = parse(local | {"openai": LOADS_ON, "queue": queue}, "the test").core()
    assert (core.classes[LOADS].queue_wait_ns_max, core.classes[LOADS].patience_ns) == (7_000_000_000, 2_000_000_000)
