"""With `identity.mode: observe` clients notice nothing, and operators see who would be denied, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import serving, until, write_adapters
from tests.kit.tokens import TokenMaker

ASKED = {"prompt": "hi", "max_tokens": 2}


def denials(data: Path) -> list[dict[str, Any]]:
    file = data / "audit" / "audit.denials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def test_who_would_be_denied_is_answered_counted_and_recorded(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    maker, data = TokenMaker(tmp_path), tmp_path / "data"
    settings = {
        "identity": {"mode": "observe", "issuers": [maker.entry]},
        "access": {"policies": {"ready": "tenant_prefix"}},
        "data_directory": str(data),
    }
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", **settings) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False, timeout=60) as http,
    ):

        async def complete(model: str, **headers: str) -> int:
            answer = await http.post("/v1/completions", json=ASKED | {"model": model}, headers=headers)
            return answer.status_code

        assert await complete("base") == 200
        assert await complete("base", authorization="Bearer nonsense") == 200
        assert await complete("a00", authorization=maker.bearer("acme"), **{"x-lora-tenant": "acme"}) == 200
        good = {"authorization": maker.bearer("acme"), "x-lora-tenant": "blue"}
        assert await complete("base", **good) == 200
        assert await complete("base", authorization=maker.bearer("acme"), **{"x-lora-tenant": "acme"}) == 200
        assert await complete("nothing") == 404
        assert {event.tenant for event in served.recorder.events if hasattr(event, "klass")} == {"", "acme", "blue"}
        await until(lambda: len(denials(data)) >= 4)
        found = [(line["result"], line["proof"], line["why"]) for line in denials(data)]
        assert all(result == "observed" for result, _, _ in found)
        text = " | ".join(why for _, _, why in found)
        for part in (
            "the call has no credential",
            "the API key is not known here",
            'the request says tenant "blue", its credential "acme"',
            "the name is not under the tenant's prefix",
        ):
            assert part in text, text
        metrics = (await http.get("/metrics")).text
        assert 'access_denied_total{cause="unauthenticated",observed="true"} ' in metrics
        assert 'access_denied_total{cause="not_permitted",observed="true"} 2.0' in metrics
        assert 'access_denied_total{cause="not_permitted",observed="false"} 0.0' in metrics
