"""What applications are written with, as it is: LangChain, LlamaIndex, litellm and its proxy."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.tools.house import House
from tests.e2e.tools.installed import Apps, Tools
from tests.kit.ports import free_port
from tests.kit.serving import PATIENCE_S

TOOLS = Apps
PROGRAMS = Path(__file__).parent / "programs"
INPUT_COST, OUTPUT_COST = 0.001, 1.0


async def told(tools: Tools, folder: Path, house: House, program: str) -> Any:
    """Return what a program printed last; litellm itself prints hints."""
    said = await tools.run(folder, "python", PROGRAMS / f"{program}.py", house.url, "a00")
    return json.loads(said.splitlines()[-1])


async def test_langchain(tools: Tools, tmp_path: Path, house: House) -> None:
    """Chats, streams and batches say what they used, and a list of prompts is answered."""
    chat, text = house.chat_tokens("hello"), house.prompt_tokens("hello")
    one = [chat, 12, chat + 12]
    assert await told(tools, tmp_path, house, "with_langchain") == {
        "chat": [one],
        "stream": [one],
        "batch": [one] * 8,
        "prompts": {"prompt_tokens": 2 * text, "completion_tokens": 24, "total_tokens": 2 * text + 24},
    }


async def test_llama_index(tools: Tools, tmp_path: Path, house: House) -> None:
    """Chats, streams and completions say what they used."""
    chat, text = house.chat_tokens("hello"), house.prompt_tokens("hello")
    one = [chat, 12, chat + 12]
    assert await told(tools, tmp_path, house, "with_llama_index") == {
        "chat": one,
        "stream": one,
        "completion": [text, 12, text + 12],
    }


async def test_litellm(tools: Tools, tmp_path: Path, house: House) -> None:
    """What it bills is what the tokens cost, by each way to name the sidecar."""
    chat = house.chat_tokens("hello")
    one = [chat, 12, chat + 12, chat * INPUT_COST + 12 * OUTPUT_COST]
    ways = ("hosted_vllm", "hosted_vllm stream", "openai", "openai stream", "router")
    assert await told(tools, tmp_path, house, "with_litellm") == dict.fromkeys(ways, one)


async def test_litellms_proxy(tools: Tools, tmp_path: Path, house: House) -> None:
    """A name below `vl/` is an adapter, and the proxy says what its answer cost."""
    prices = {"input_cost_per_token": INPUT_COST, "output_cost_per_token": OUTPUT_COST}
    reach = {"model": "hosted_vllm/*", "api_base": f"{house.url}/v1", "api_key": "none", **prices}
    key = f"sk-{secrets.token_hex(32)}"
    settings = {
        "model_list": [{"model_name": "vl/*", "litellm_params": reach}],
        "general_settings": {"master_key": key},
    }
    (tmp_path / "proxy.json").write_text(json.dumps(settings))
    port = free_port()
    proxy = asyncio.create_task(
        tools.run(tmp_path, "litellm", "--config", "proxy.json", "--host", "127.0.0.1", "--port", str(port))
    )
    named = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, headers=named) as client:
        try:
            while not await is_live(client):
                assert not proxy.done(), proxy.result()
                await asyncio.sleep(0.1)
            body = {"model": "vl/a00", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
            answer = await client.post("/v1/chat/completions", json=body, timeout=PATIENCE_S)
        finally:
            proxy.cancel()
            await asyncio.gather(proxy, return_exceptions=True)
    assert answer.status_code == 200, answer.text
    chat, usage = house.chat_tokens("hello"), answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (chat, 12, chat + 12)
    assert float(answer.headers["x-litellm-response-cost"]) == chat * INPUT_COST + 12 * OUTPUT_COST


async def is_live(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health/liveliness")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
