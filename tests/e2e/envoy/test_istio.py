"""The EnvoyFilter of examples/istio-envoyfilter, merged into what Istio configures for a gateway, in a real Envoy.

Its retries are read in istio/istio 86c9f01, pilot/pkg/networking/core/route/retry/retry.go, and what MERGE does in
pkg/proto/merge/merge.go.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from sidecar.fronts.extproc.bootstrap import TYPE, bootstrap
from tests.e2e.envoy.house import ENGINE, House
from tests.e2e.envoy.server import EnvoyInstalled, EnvoyServer
from tests.e2e.envoy.variants import Change, istio, manager_of
from tests.e2e.installed import ROOT
from tests.kit.serving import PATIENCE_S, Serving, serving, until, write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG
from tests.kit.vllm_emulated import VllmProcess

FILTER = ROOT / "examples" / "istio-envoyfilter" / "envoyfilter.yaml"
PICKER = "outbound|9004||pool-lora-sidecar-picker.models.svc.cluster.local"
POOL = "outbound|8000||vllm-ip-03f70481.models.svc.cluster.local"
ROUTE = "models.llm.0"
EXT_PROC, MANAGER = "envoy.filters.http.ext_proc", "envoy.filters.network.http_connection_manager"
RETRIES = {
    "num_retries": 2,
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": f"{TYPE}retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }
    ],
    "host_selection_retry_max_attempts": 5,
}
MESSAGES_MAX = 12
"""That Envoy sends for an answer whose call is closed at its first chunk; one that is followed has up to 100."""
MAPS = ("typed_per_filter_config",)
"""Maps, whose entries a merge replaces."""


def patches() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(FILTER.read_text())["spec"]["configPatches"]
    return found


def as_istio(record: dict[str, Any], engines: list[str]) -> None:
    """Make a bootstrap of ours what Istio makes for a Gateway with a route to an InferencePool, its names included."""
    istio(engines)(record)
    [host] = manager_of(record)["route_config"]["virtual_hosts"]
    route = host["routes"][-1]
    route |= {"name": ROUTE, "route": {"cluster": POOL, "timeout": "0s", "retry_policy": RETRIES}}
    host["routes"] = [route]
    route["typed_per_filter_config"][EXT_PROC]["overrides"]["grpc_service"]["envoy_grpc"]["cluster_name"] = PICKER
    clusters = {each["name"]: each for each in record["static_resources"]["clusters"]}
    for old, new in (("sidecar", PICKER), ("engines", POOL)):
        clusters[old]["name"] = clusters[old]["load_assignment"]["cluster_name"] = new


def patched(record: dict[str, Any]) -> int:
    """Apply the EnvoyFilter where its matches hold, as Istio does; return how many patches found something."""
    manager, applied = manager_of(record), 0
    for each in patches():
        assert each["patch"]["operation"] == "MERGE"
        assert each["match"]["context"] == "GATEWAY"
        value = each["patch"]["value"]
        if each["applyTo"] == "HTTP_ROUTE":
            wanted = each["match"]["routeConfiguration"]["vhost"]["route"]["name"]
            found = [route for host in manager["route_config"]["virtual_hosts"] for route in host["routes"]]
            found = [route for route in found if route["name"] == wanted]
        else:
            chain = each["match"]["listener"]["filterChain"]["filter"]
            assert chain["name"] == MANAGER
            assert value["name"] == chain.get("subFilter", chain)["name"]
            value = value["typed_config"]
            found = [manager]
            if each["applyTo"] == "HTTP_FILTER":
                filters = manager["http_filters"]
                found = [each["typed_config"] for each in filters if each["name"] == chain["subFilter"]["name"]]
            assert all(config["@type"] == value["@type"] for config in found)
        for config in found:
            merge(config, value)
            applied += 1
    return applied


def merge(into: dict[str, Any], value: dict[str, Any]) -> None:
    """Merge as Istio merges messages: lists are appended to, entries of maps replaced, zeros not seen."""
    for key, new in value.items():
        if key in MAPS:
            into.setdefault(key, {}).update(deepcopy(new))
        elif isinstance(new, dict) and isinstance(into.get(key), dict):
            merge(into[key], new)
        elif isinstance(new, list):
            into[key] = [*into.get(key, []), *deepcopy(new)]
        elif new or isinstance(new, bool) or key not in into:
            into[key] = deepcopy(new)


@asynccontextmanager
async def gateway(
    folder: Path, engines: int, is_patched: bool, time_scale: float = 0.0, also: Change = lambda record: None
) -> AsyncIterator[House]:
    """Run emulated vLLMs, a sidecar, and an Envoy as Istio's gateway, with the EnvoyFilter or without.

    `also` changes Envoy's configuration after that.
    """
    (folder / "shared").mkdir()
    base = folder / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    async with AsyncExitStack() as stack:
        running = [VllmProcess("--compute", "none", time_scale=time_scale) for _ in range(engines)]
        for process in running:
            await process.start()
            stack.push_async_callback(process.kill)
        free = {"address": "127.0.0.1:0"}
        model = {"name": "tiny-llama", "aliases": ["base"], "config": str(base)}
        backend = {"adapters_dir": str(folder / "shared"), "engine": ENGINE, "base_model": model}
        listeners = {"data": free, "admin": free, "http": free, "endpoint_picker": free}
        served = await stack.enter_async_context(
            serving(running, folder / "adapters", backend=backend, listeners=listeners)
        )

        def changed(record: dict[str, Any]) -> None:
            as_istio(record, [process.http_address for process in running])
            assert not is_patched or patched(record) == len(patches())
            also(record)

        envoy = EnvoyServer(folder / "envoy", served.sidecar.endpoint_picker_address, changed=changed)
        await stack.enter_async_context(envoy)
        http = httpx.AsyncClient(base_url=f"http://{envoy.address}", timeout=60.0, trust_env=False)
        yield House(await stack.enter_async_context(http), served, envoy, running, folder)


async def stat(house: House, name: str) -> int:
    """Return a counter of Envoy's, 0 if it has not begun."""
    text = (await house.http.get(f"http://{house.envoy.admin}/stats?filter=^{re.escape(name)}$")).text
    return int(text.rpartition(": ")[2] or 0)


async def is_quiet(served: Serving) -> None:
    await until(lambda: not served.state.requests)


def test_envoy_takes_it(tmp_path: Path) -> None:
    """What Istio would send to its gateway is a configuration that Envoy accepts."""
    record = bootstrap(8080, ["127.0.0.1:9004"])
    as_istio(record, ["127.0.0.1:8000"])
    assert patched(record) == len(patches())
    (tmp_path / "envoy.json").write_text(json.dumps(record))
    command = [str(EnvoyInstalled.find().binary), "--mode", "validate", "-c", str(tmp_path / "envoy.json")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("is_patched", [False, True])
async def test_answers_pass_the_gateway_only(tmp_path: Path, is_patched: bool) -> None:
    """With it the sidecar sees an answer's first chunk, and the log tells its end; as Istio has it, every chunk."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with gateway(tmp_path, 2, is_patched, time_scale=0.2) as house:
        for name in names:
            answer = await house.stream(name, 100)
            assert answer.status == 200, answer.raw
            assert answer.is_complete
            assert answer.token_ids == house.tokens_of(name, 100)
            await is_quiet(house.served)
        sent = await stat(house, "http.clients.ext_proc.stream_msgs_sent")
        log = house.served.sidecar.listening._picker.log.entries
        if is_patched:
            assert sent <= 2 * MESSAGES_MAX
            assert log["used"] >= 2
        else:
            assert sent > 100
            assert set(log.values()) == {0}


async def test_who_tries_again_is_the_sidecar(tmp_path: Path) -> None:
    """Istio's own retries take any engine, with a body that was meant for another; the filter ends them."""

    def unreachable(record: dict[str, Any]) -> None:
        """Have Envoy speak TLS to engines, which have none: no connection is made, and the sidecar sees them up."""
        tls = {"@type": f"{TYPE}transport_sockets.tls.v3.UpstreamTlsContext"}
        for cluster in record["static_resources"]["clusters"]:
            if cluster["name"] == POOL:
                cluster["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": tls}

    [name] = write_adapters(tmp_path / "adapters", 1)
    async with gateway(tmp_path, 1, is_patched=True, also=unreachable) as house:
        asking = asyncio.create_task(house.stream(name, 4))
        async with asyncio.timeout(PATIENCE_S):
            while not await stat(house, f"cluster.{POOL}.upstream_rq_503"):
                await asyncio.sleep(0.01)
        asking.cancel()
        assert await stat(house, f"cluster.{POOL}.upstream_rq_retry") == 0
