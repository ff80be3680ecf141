"""Emulated SGLangs for tests, in this process. Time is not simulated unless an option says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from sidecar.lab.engine.openai.sglang import SglangOptions, SglangServer, serve_sglang
from tests.kit.peft_files import BASE_MODEL
from tests.kit.trtllm_emulated import BASE_CONFIG
from tests.kit.vllm_emulated import BASE, Client


async def start_sglang(**options: Any) -> SglangServer:
    """Start an emulated SGLang in this event loop; the caller stops it."""
    return await serve_sglang(SglangOptions(**({"time_scale": 0.0, "served_model_name": (BASE,)} | options)))


@asynccontextmanager
async def running_sglang(**options: Any) -> AsyncIterator[SglangServer]:
    """Run an emulated SGLang."""
    engine = await start_sglang(**options)
    try:
        yield engine
    finally:
        await engine.stop()


def sglang_entry(folder: Path) -> dict[str, Any]:
    """Return an entry's keys for such an engine with the small Llama, whose config.json is written to the folder."""
    config = folder / "base.json"
    config.write_text(json.dumps(BASE_CONFIG))
    return {"base_model": {"name": BASE, "aliases": [BASE_MODEL], "config": str(config)}}


class SglangClient(Client):
    """A client that asks SGLang itself, by its own calls."""

    async def load(self, name: str, path: Any, **fields: Any) -> httpx.Response:
        return await self.http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)

    async def unload(self, name: str) -> httpx.Response:
        return await self.http.post("/unload_lora_adapter", json={"lora_name": name})
