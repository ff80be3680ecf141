"""A web page had a visitor's browser ask for it: text, forms and bytes without a type need no leave of the server."""

from __future__ import annotations

import asyncio
import http.client
import json
from pathlib import Path

import httpx
import pytest

from sidecar.fronts.http.drain import HttpDrain
from tests.kit.openai_house import ScriptedVllm, house

BODY = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 1}).encode()
ANSWER = b'{"id":"cmpl-1","model":"base","choices":[{"index":0,"text":"x"}]}'
SENT_WITHOUT_ASKING = [
    [("content-type", "text/plain")],
    [("content-type", "text/plain;charset=UTF-8")],
    [("content-type", "application/x-www-form-urlencoded")],
    [("content-type", "multipart/form-data; boundary=application/json")],
    [("content-type", "text/plain; application/json")],
    [],
    [("content-type", "")],
    [("content-type", "text/plain"), ("content-type", "application/json")],
]
NOT_UTF8 = [[("content-type", f"application/json; charset={name}")] for name in ("latin-1", "utf-16", '"utf-7"', "")]
JSON = [
    "application/json",
    "application/json; charset=utf-8",
    'Application/JSON ; Charset="UTF-8"',
    "application/json;",
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_a_page_can_send_without_asking(tmp_path: Path, path: str) -> None:
    """No engine is asked; the answer says what to send."""
    async with house(tmp_path, [ScriptedVllm()]) as served, httpx.AsyncClient(base_url=served.url) as client:
        for headers in SENT_WITHOUT_ASKING + NOT_UTF8:
            answer = await client.post(path, content=BODY, headers=headers)
            assert answer.status_code == 415, headers
            assert "JSON is UTF-8" in answer.text or "content-type: application/json" in answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert not served.gateway.state.requests


@pytest.mark.parametrize("kind", JSON)
async def test_json_is_taken(tmp_path: Path, kind: str) -> None:
    """With the parameters that clients add."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        asking = asyncio.create_task(
            served.client.post("/v1/completions", content=BODY, headers={"content-type": kind})
        )
        async with asyncio.timeout(60):
            while not engine.running:
                await asyncio.sleep(0)
        engine.deliver(ANSWER, final=True)
        assert (await asking).status_code == 200


def _post(address: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/drain", body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


async def test_a_drain_with_a_body_of_another_type(tmp_path: Path) -> None:
    """Nothing is drained by it, and it is by what Kubernetes' hook sends, which has no body."""
    drains = 0

    async def drain() -> None:
        nonlocal drains
        drains += 1

    front = HttpDrain(drain, lambda: None, "127.0.0.1:0")
    await front.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{front.address}") as client:
            for headers in ({"content-type": "text/plain"}, {}):
                assert (await client.post("/drain", content=b"x", headers=headers)).status_code == 415
        assert drains == 0
        assert await asyncio.to_thread(_post, front.address, None, {}) == (200, b"drained\n")
        assert await asyncio.to_thread(_post, front.address, b"{}", {"content-type": "application/json"}) == (
            200, b"drained\n",
        )  # fmt: skip
        assert drains == 2
    finally:
        await front.stop()
