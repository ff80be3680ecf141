"""Tenants in front of one real vLLM: prefix blocks are found by those who may find them; its weights are compared."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.vllm.direct import http_client, metrics
from tests.e2e.vllm.fronted import in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy, prompt
from tests.integration.test_cache_salts import KEYS, enforced
from tests.kit.serving import until

PROMPT = prompt(11, 600)
"""Longer than several blocks of the CPU's."""
COMPLETION = {"model": "base", "prompt": PROMPT, "max_tokens": 2}


async def test_no_tenant_finds_another_ones_prefix_blocks(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Its own it does, of both APIs, and without enforcement everybody's."""
    for config, others in ((enforced(tmp_path), False), ({}, True)):
        scratch = tmp_path / str(others)
        scratch.mkdir()
        async with in_front(either, toy.adapters, scratch, **config) as front, http_client(either.http_address) as own:

            async def finds(tenant: str, salt: str) -> bool:
                """Ask, and return whether blocks of the prompt were there."""
                before = (await metrics(own)).values.get("vllm:prefix_cache_hits_total", 0.0)
                headers = {"authorization": f"Bearer {KEYS[tenant]}", "x-lora-tenant": tenant}
                body = COMPLETION | ({"cache_salt": salt} if salt else {})
                reply = await front.client.post("/v1/completions", json=body, headers=headers)
                assert reply.status_code == 200, reply.text
                return (await metrics(own)).values.get("vllm:prefix_cache_hits_total", 0.0) > before

            salt = "" if others else "of a client"
            await finds("acme", "")
            assert await finds("acme", "")
            assert await finds("blue", "") == others
            if not others:
                assert not await finds("blue", salt)
                assert await finds("blue", salt)
                assert not await finds("acme", salt)


async def test_its_weights_are_compared_at_each_connect(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """It says the same each time."""
    async with in_front(either, toy.adapters, tmp_path, weights_check="warn") as front:
        check = front.served.sidecar.gateway.fleet.check
        await until(lambda: "vllm-0" in check._said)
        text, ids = check._said["vllm-0"][1]
        assert text or ids
        assert not check.differing
