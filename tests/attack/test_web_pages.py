"""A web page has a browser on this machine ask what listens here: with its own origin, from another site, or by a name
of its own that it has lead here (DNS rebinding). Who asks from a shell, and a kubelet, sends nothing like it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

FREE: dict[str, Any] = {"address": "127.0.0.1:0"}
EVIL = "https://page.example"
OF_PAGES = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site"},
    {"host": "page.example:9002"},
    {"host": "127.0.0.1.page.example"},
    {"host": "page.example.", "origin": "http://page.example."},
]
OF_OTHERS = [
    {},
    {"host": "localhost"},
    {"host": "LOCALHOST.:9002", "sec-fetch-site": "none"},
    {"host": "[::1]:9002"},
    {"host": "10.1.2.3:9004"},  # a pod's address, as kubelets write it
    {"host": "my-machine"},
    {"host": "app.localhost:9002"},
    {"host": "host.docker.internal:9002"},
]
BODY = {"model": "a00", "prompt": "hello", "max_tokens": 2}


@asynccontextmanager
async def served_here(folder: Path, http: dict[str, Any] | None = None, **record: Any) -> AsyncIterator[Serving]:
    write_adapters(folder / "adapters", 1)
    listeners = {"data": FREE, "admin": FREE, "http": FREE | (http or {}), "probes": FREE, "drain": FREE}
    listeners |= record.pop("listeners", {})
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        serving([engine], folder / "adapters", listeners=listeners, **record) as served,
    ):
        yield served


async def asked(address: str, method: str, path: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
        return await client.request(method, path, headers=headers, **more)


@pytest.mark.parametrize("headers", OF_PAGES, ids=str)
async def test_a_page_neither_ends_the_process_nor_has_it_work(tmp_path: Path, headers: dict[str, str]) -> None:
    async with served_here(tmp_path) as served:
        listening = served.sidecar.listening
        answer = await asked(listening.drain, "POST", "/drain", headers)
        assert (answer.status_code, served.state.draining) == (403, False)
        assert "127.0.0.1" in answer.text or "cors_origins" in answer.text  # the way out
        for method, path, more in (("POST", "/v1/completions", {"json": BODY}), ("GET", "/v1/models", {})):
            assert (await asked(listening.http, method, path, headers, **more)).status_code == 403, path
        assert not served.state.requests
        assert (await asked(listening.probes, "GET", "/metrics", headers)).status_code == 403


@pytest.mark.parametrize("headers", OF_OTHERS, ids=str)
async def test_others_are_answered(tmp_path: Path, headers: dict[str, str]) -> None:
    async with served_here(tmp_path) as served:
        listening = served.sidecar.listening
        assert (await asked(listening.http, "POST", "/v1/completions", headers, json=BODY)).status_code == 200
        assert (await asked(listening.probes, "GET", "/readyz", headers)).status_code == 200
        assert (await asked(listening.drain, "POST", "/drain", headers)).text == "drained\n"


async def test_pages_that_are_named_may_ask(tmp_path: Path) -> None:
    """Wherever they come from; no other page, and not by a name of another's."""
    async with served_here(tmp_path, {"cors_origins": [EVIL]}) as served:
        listening, of_page = served.sidecar.listening, {"origin": EVIL, "sec-fetch-site": "cross-site"}
        assert (await asked(listening.http, "POST", "/v1/completions", of_page, json=BODY)).status_code == 200
        for headers in (of_page | {"host": "page.example"}, {"origin": "https://other.example"}):
            assert (await asked(listening.http, "POST", "/v1/completions", headers, json=BODY)).status_code == 403
        assert (await asked(listening.drain, "POST", "/drain", of_page)).status_code == 403
    async with served_here(tmp_path / "all", {"cors_origins": ["*"]}) as served:
        of_page |= {"host": "page.example"}
        assert (await asked(served.sidecar.http_address, "POST", "/v1/completions", of_page, json=BODY)).is_success


async def test_names_of_a_gateway_s_clients_are_its_own(tmp_path: Path) -> None:
    """A gateway on this machine passes on the names by which its clients reach it, as Envoy does."""
    picker = FREE | {"in_path": "127.0.0.1:9002"}
    async with served_here(tmp_path, listeners={"endpoint_picker": picker}) as served:
        answer = await asked(served.sidecar.http_address, "POST", "/v1/completions", {"host": "a.example"}, json=BODY)
        assert answer.status_code == 200


async def test_a_credential_is_as_good_as_before(tmp_path: Path) -> None:
    """Where one is asked for, the refusal is for want of it."""
    async with served_here(tmp_path, identity={"mode": "enforce"}) as served:
        for headers in ({"host": "page.example"}, {"origin": EVIL}):
            assert (await asked(served.sidecar.http_address, "GET", "/v1/models", headers)).status_code == 401
