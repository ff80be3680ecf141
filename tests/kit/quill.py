"""A dialect that rests on what is usual (`Dialect`), and not on another server's: of a server that is made up.

Quill (`fake_quill.py`) has no list of what is loaded, writes its adapters' names after a plus, and has calls of its own
for all but completions and chats.
"""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import quote

from sidecar.backends.http_client import Reply, WireError
from sidecar.backends.openai import vllm
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.server import OpenAiServer, Served, epoch_header
from sidecar.config.backends import Backend as Entry


class QuillEntry(Entry):
    """A Quill server, by `quill://HOST:PORT`."""

    SCHEMES: ClassVar = {"quill": False}


class Quill(Dialect):
    model = replace(vllm.MODEL, name="quill", title="Quill", why_not_client=lambda path, members: ("", ""))
    section = QuillEntry
    start = "quill serve …"
    load_path, health_path, models_path = "/quill/adapters", "/quill/live", ""

    async def _info(self, server: OpenAiServer) -> dict[str, Any]:
        record = await server.record("/quill/info")
        if not isinstance(record, dict) or record.get("product") != "quill":
            raise server.unusable("it does not answer /quill/info: no Quill")
        return record

    async def recognise(self, server: OpenAiServer) -> str:
        return f"Quill {(await self._info(server))['version']}"

    async def served(self, server: OpenAiServer) -> Served:
        return Served((await self._info(server))["base"])

    async def identify(self, server: OpenAiServer, entry: QuillEntry) -> Found:
        info = await self._info(server)
        limits = {"slots": info["slots"], "host_pages": info["host_slots"], "rank_max": info["max_rank"]}
        return replace(await super().identify(server, entry), unloads="name", **limits)

    async def measures(self, server: OpenAiServer) -> Measures:
        try:
            record = await server.record("/quill/load")
        except WireError:
            return Measures()
        inside = record["running"] + record["waiting"]
        return Measures(record["steps"], kv_tokens=record["kv_tokens"], kv_used=record["kv_used"], inside=inside)

    def model_name(self, base: str, name: str) -> str:
        return f"{base}+{name}"

    async def load(self, server: OpenAiServer, name: str, path: str, timeout_s: float, epoch: int = 0) -> Reply:
        return await server.client.post(self.load_path, {"id": name, "source": path}, timeout_s, epoch_header(epoch))

    async def unload(self, server: OpenAiServer, name: str, timeout_s: float) -> Reply:
        return await server.client.delete(f"{self.load_path}/{quote(name)}", timeout_s)

    def is_loaded(self, reply: Reply) -> bool:
        return reply.is_ok or reply.status == HTTPStatus.CONFLICT


DIALECT = Quill()
