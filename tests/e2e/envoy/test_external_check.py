"""One server of external authorization, asked by a real Envoy and by the sidecar behind it about the same requests.

Envoy's questions and its reading of answers are the measure: the server knows only the numbers of Envoy's protos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.events import Received
from tests.e2e.envoy.house import LANES, House, house, http_filters
from tests.kit.authorization import (
    PERMISSION_DENIED,
    Answer,
    Asked,
    AuthorizationServer,
    authorization,
    denied,
    ok,
)
from tests.kit.protobuf_wire import field, number_field
from tests.kit.serving import write_adapters
from tests.kit.tokens import TokenMaker

lanes = pytest.mark.parametrize("lane", LANES)
TYPE = "type.googleapis.com/envoy.extensions."


def asks(address: str) -> Any:
    """Return what has Envoy ask a server of external authorization before it asks the sidecar."""
    host, _, port = address.rpartition(":")
    place = {"address": {"socket_address": {"address": host, "port_value": int(port)}}}
    options = {
        "@type": f"{TYPE}upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "checks",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "checks", "endpoints": [{"lb_endpoints": [{"endpoint": place}]}]},
        "typed_extension_protocol_options": {f"{TYPE}upstreams.http.v3.HttpProtocolOptions".partition("/")[2]: options},
    }
    check = {
        "@type": f"{TYPE}filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": "checks"}, "timeout": "10s"},
    }

    def change(record: dict[str, Any]) -> None:
        record["static_resources"]["clusters"].append(cluster)
        http_filters(record).insert(0, {"name": "envoy.filters.http.ext_authz", "typed_config": check})

    return change


def is_ours(asked: Asked) -> bool:
    return "action" in asked.extensions


def to(envoys: bytes, ours: bytes) -> Answer:
    """Return what answers each of the two who ask."""
    return lambda asked: ours if is_ours(asked) else envoys


async def ask(running: House, maker: TokenMaker, path: str = "/v1/completions?q=1") -> httpx.Response:
    body = {"model": "a00", "prompt": "hello", "max_tokens": 4}
    headers = {"authorization": maker.bearer("acme"), "x-request-id": "r-1", "x-lora-tenant": "acme"}
    return await running.http.post(path, json=body, headers=headers)


async def test_envoy_and_the_sidecar_ask_alike_and_read_alike(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    maker = TokenMaker(tmp_path)
    async with authorization() as checks:
        external = {"address": checks.address, "timeout_s": 10.0}
        identity = {"mode": "enforce", "issuers": [maker.entry], "external": external}
        async with house(tmp_path, [], changed=asks(checks.address), identity=identity) as running:
            await compare_questions(running, maker, checks)
            await compare_answers(running, maker, checks)


@lanes
async def test_a_denial_by_the_gateways_own_check_reaches_the_client(tmp_path: Path, lane: str) -> None:
    """Its answer passes the endpoint picker, which has not heard of the request, in each of its modes."""
    write_adapters(tmp_path / "adapters", 1)
    maker = TokenMaker(tmp_path)
    async with authorization() as checks, house(tmp_path, [], lane, changed=asks(checks.address)) as running:
        for body in ("", "never", "x" * 100_000):
            checks.answer = lambda asked, body=body: denied(401, body, {"www-authenticate": "Basic"})  # type: ignore[misc]
            refused = await ask(running, maker)
            assert (refused.status_code, refused.text) == (401, body)
            assert refused.headers["www-authenticate"] == "Basic"
        checks.answer = lambda asked: ok()
        assert (await ask(running, maker)).status_code == 200


async def compare_questions(running: House, maker: TokenMaker, checks: AuthorizationServer) -> None:
    assert (await ask(running, maker)).status_code == 200
    theirs, ours = sorted(checks.asked, key=is_ours)
    assert not is_ours(theirs)
    assert is_ours(ours)
    for name in ("host", "method", "path", "authority", "protocol"):
        assert getattr(theirs, name), name
        assert getattr(theirs, name) == getattr(ours, name), name
    assert ours.id == "r-1"
    assert theirs.id
    assert theirs.port > 0
    assert ours.port > 0
    sent = {"authorization", "x-request-id", "x-lora-tenant"}
    assert ours.headers.keys() == sent
    assert {name: theirs.headers[name] for name in sent} == ours.headers
    assert ours.extensions["tenant"] == "acme"


ANSWERS = {
    "403": denied(403, "not on weekends"),
    "401": denied(401, "who", {"www-authenticate": 'Bearer realm="llm"'}),
    "429": denied(429, "slowly", {"retry-after": "7"}),
    "no status": denied(None, "no"),
    "the status of RPC alone": field(1, number_field(1, PERMISSION_DENIED)),
    "ok with a status of RPC": field(3, b"") + field(1, number_field(1, PERMISSION_DENIED)),
    "ok": ok(),
    "only a status": field(1, b""),
}


async def compare_answers(running: House, maker: TokenMaker, checks: AuthorizationServer) -> None:
    for name, answer in ANSWERS.items():
        checks.answer = to(answer, ok())
        theirs = await ask(running, maker)
        checks.answer = to(ok(), answer)
        ours = await ask(running, maker)
        assert theirs.status_code == ours.status_code, (name, theirs.headers, theirs.text, ours.text)
        for header in ("www-authenticate", "retry-after"):
            assert theirs.headers.get(header) == (ours.headers.get(header)), (name, header)
        if theirs.status_code != 200 and theirs.text:
            assert theirs.text in ours.json()["error"]["message"], name
    checks.answer = to(ok(), b"")  # Envoy reads nothing as a yes; here it is a failure
    assert (await ask(running, maker)).status_code == 503
    checks.answer = to(b"", ok())
    assert (await ask(running, maker)).status_code == 200


@lanes
async def test_the_endpoint_picker_asks(tmp_path: Path, lane: str) -> None:
    """Nothing reaches an engine that the server denies, and a server that is away is a 503."""
    write_adapters(tmp_path / "adapters", 1)
    maker = TokenMaker(tmp_path)
    async with authorization(lambda asked: denied(403, "never")) as checks:
        identity = {"mode": "enforce", "issuers": [maker.entry], "external": {"address": checks.address}}
        async with house(tmp_path, [], lane, identity=identity) as running:
            refused = await ask(running, maker)
            assert (refused.status_code, refused.json()["error"]["message"]) == (403, "never")
            await checks.stop()
            away = await ask(running, maker)
            assert (away.status_code, away.json()["error"]["reason"]) == (503, "state_unavailable")
            assert not [event for event in running.served.recorder.events if isinstance(event, Received)]
