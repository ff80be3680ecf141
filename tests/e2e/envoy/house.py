"""A sidecar in this event loop, emulated vLLMs behind it, and a real Envoy in front."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.envoy.server import EnvoyServer
from tests.e2e.envoy.variants import add_server, manager_of
from tests.kit.serving import Serving, serving
from tests.kit.trtllm_emulated import BASE_CONFIG
from tests.kit.vllm_emulated import VllmProcess, expected

LANES = {
    "duplex-streamed": ("FULL_DUPLEX_STREAMED", "STREAMED", {}),
    "duplex-duplex": ("FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED", {}),
    "duplex-none": ("FULL_DUPLEX_STREAMED", "NONE", {}),
    "buffered-override": ("BUFFERED", "BUFFERED", {"override_mode": True}),
    "buffered": ("BUFFERED", "BUFFERED", {}),
}
"""The modes of gateways, by name: of requests, of answers, and what the listener needs for them."""


SIZES = ("--compute", "none", "--max-loras", "4", "--max-cpu-loras", "8")
ENGINE = {"device_pages": 4, "host_pages": 8, "seats": 64}


@dataclass
class Clients:
    """Clients that ask through `http`."""

    http: httpx.AsyncClient

    async def stream(
        self, model: str, tokens: int, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Streamed:
        """Ask for a stream of events and read it to its end. Raises httpx.HTTPError if that does not come."""
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "stream": True, "return_token_ids": True}
        path = "/v1/completions"
        async with self.http.stream("POST", path, json=body | fields, headers=headers) as reply:
            raw = b"".join([chunk async for chunk in reply.aiter_raw()])
        return Streamed(reply.status_code, dict(reply.headers), raw)

    async def whole(self, model: str, tokens: int, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "return_token_ids": True}
        return await self.http.post("/v1/completions", json=body | fields)


@dataclass
class House(Clients):
    """All of it. Clients reach Envoy."""

    served: Serving
    envoy: EnvoyServer
    engines: Sequence[Any]
    folder: Path

    def engines_name(self, name: str) -> str:
        """Return the name that vLLM has for an adapter."""
        return f"{name}@{self.served.state.names[name].digest[:12]}"

    def tokens_of(self, name: str, count: int) -> list[int]:
        """Return the tokens of an engine with dummy compute."""
        return (
            expected(self.engines_name(name), self.folder / "adapters" / name, count)
            if name
            else expected("", None, count)
        )


@dataclass
class Streamed:
    """The answer to a stream."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def events(self) -> list[Any]:
        found = [event.removeprefix(b"data: ") for event in self.raw.split(b"\n\n") if event]
        return [json.loads(event) if event != b"[DONE]" else None for event in found]

    @property
    def token_ids(self) -> list[int]:
        return [
            each
            for event in self.events
            if event and event.get("choices")
            for each in event["choices"][0].get("token_ids") or ()
        ]

    @property
    def is_complete(self) -> bool:
        return self.raw.endswith(b"data: [DONE]\n\n")


def http_filters(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the HTTP filters of a bootstrap."""
    found: list[dict[str, Any]] = manager_of(record)["http_filters"]
    return found


def set_metadata(namespace: str, key: str, header: str) -> dict[str, Any]:
    """Return a filter that sets dynamic metadata by a client's header, as a gateway does by its own knowledge."""
    rule = {
        "header": header,
        "on_header_present": {"metadata_namespace": namespace, "key": key, "type": "STRING"},
        "remove": True,
    }
    kind = "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config"
    return {"name": "metadata", "typed_config": {"@type": kind, "request_rules": [rule]}}


def log_to(address: str) -> Callable[[dict[str, Any]], None]:
    """Return what changes a bootstrap so that the access log goes to another address than the picker's."""

    def change(record: dict[str, Any]) -> None:
        add_server(record, "log", address)
        for log in manager_of(record)["access_log"]:
            log["typed_config"]["common_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] = "log"

    return change


@asynccontextmanager
async def house(
    folder: Path,
    names: Sequence[str],
    lane: str = "duplex-streamed",
    engines: int = 1,
    options: Sequence[str] = (),
    time_scale: float = 0.0,
    changed: Callable[[dict[str, Any]], None] = lambda record: None,
    listener: Mapping[str, Any] | None = None,
    http: str | None = None,
    **record: Any,
) -> AsyncIterator[House]:
    """Run it. `options` are those of `sidecar emulate --protocol vllm`, `changed` changes Envoy's bootstrap.

    `listener` has settings of the endpoint picker, `http` the address of the http listener.
    """
    request_mode, response_mode, needed = LANES[lane]
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        running = []
        for _ in range(engines):
            process = VllmProcess(*SIZES, *options, time_scale=time_scale)
            await process.start()
            stack.push_async_callback(process.kill)
            running.append(process)
        free = {"address": "127.0.0.1:0"}
        listeners = {"data": free, "admin": free, "http": free if http is None else {"address": http}}
        listeners["endpoint_picker"] = free | needed | dict(listener or {})
        base = folder / "base.json"
        base.write_text(json.dumps(BASE_CONFIG))
        model = {"name": "tiny-llama", "aliases": ["base"], "config": str(base)}
        backend = {"adapters_dir": str(shared), "engine": ENGINE, "base_model": model} | record.pop("backend", {})
        served = await stack.enter_async_context(
            serving(running, folder / "adapters", backend=backend, listeners=listeners, **record)
        )
        envoy = EnvoyServer(
            folder / "envoy", served.sidecar.endpoint_picker_address, request_mode, response_mode, changed
        )
        await stack.enter_async_context(envoy)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        http = httpx.AsyncClient(base_url=f"http://{envoy.address}", timeout=60.0, trust_env=False, limits=limits)
        yield House(await stack.enter_async_context(http), served, envoy, running, folder)
