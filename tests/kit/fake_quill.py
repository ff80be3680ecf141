"""A small fake of Quill's server. An answer is made of the words of its adapter's file, or of `BASE`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

BASE = "feather"
DIGITS = 8


def words_of(folder: Path | None) -> str:
    """Return what an adapter answers whose files are in a folder; None is the base model."""
    if folder is None:
        return BASE
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()[:DIGITS]


def ids_of(words: str) -> list[int]:
    return list(words.encode())


class FakeQuill:
    """What it has loaded, and what it was asked."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.removals: list[str] = []
        self.authorized: list[str] = []
        self.steps = 0
        self.is_dead = False
        self.dies_in_streams = False
        self.style: Literal["compact", "spaced", "crlf"] = "compact"
        self.address = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/quill/info", self._info),
                web.get("/quill/live", self._live),
                web.get("/quill/load", self._load_of),
                web.post("/quill/adapters", self._add),
                web.delete("/quill/adapters/{name}", self._remove),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
            ]
        )
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        port = int(self.address.rpartition(":")[2] or 0)
        await web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """It forgets all."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        self.loaded.clear()
        self.steps = 0

    async def _info(self, request: web.Request) -> web.Response:
        limits = {"slots": 4, "host_slots": 16, "max_rank": 32}
        return _json({"product": "quill", "version": "1.4.2", "base": BASE} | limits)

    async def _live(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_dead else 200)

    async def _load_of(self, request: web.Request) -> web.Response:
        kv = {"kv_tokens": 4096, "kv_used": 0}
        return _json({"steps": self.steps, "running": 0, "waiting": 0} | kv)

    async def _read(self, request: web.Request) -> dict[str, Any]:
        self.authorized += [request.path] if "authorization" in request.headers else []
        record: dict[str, Any] = await request.json()
        self.calls.append((request.path, record))
        return record

    async def _add(self, request: web.Request) -> web.Response:
        record = await self._read(request)
        if record["id"] in self.loaded:
            return _error(409, "adapter exists")
        self.loaded[record["id"]] = record["source"]
        return _json({"state": "ready"}, 201)

    async def _remove(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.removals.append(name)
        known = self.loaded.pop(name, None)
        return _error(404, f"no adapter called {name}") if known is None else web.Response(status=204)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        if self.is_dead:
            return _error(503, "the engine is gone")
        base, plus, name = body["model"].partition("+")
        if base != BASE or (plus and name not in self.loaded):
            return _error(404, f"no adapter called {name or base}")
        self.steps += 1
        words = words_of(Path(self.loaded[name]) if plus else None)
        is_chat = request.path.endswith("chat/completions")
        used = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        if not body.get("stream"):
            said = {"message": {"role": "assistant", "content": words}} if is_chat else {"text": words}
            choice = {"index": 0} | said | {"finish_reason": "length", "token_ids": ids_of(words)}
            return _json({"id": "q", "model": body["model"], "choices": [choice], "usage": used})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for letter in words:
            said = {"delta": {"content": letter}} if is_chat else {"text": letter}
            choice = {"index": 0} | said | {"finish_reason": None, "token_ids": ids_of(letter)}
            await answer.write(self._event({"id": "q", "model": body["model"], "choices": [choice]}))
            if self.dies_in_streams:
                assert request.transport is not None
                request.transport.abort()
                return answer
        await answer.write(self._event(None))
        return answer

    def _event(self, record: Any) -> bytes:
        """Return an event, or the end of a stream, in the server's style: compact, spaced, or with carriage returns."""
        line = {"compact": b"data: ", "spaced": b"data: ", "crlf": b"data:"}[self.style]
        dumped = _compact(record) if self.style == "compact" else json.dumps(record).encode()
        end = b"\r\n\r\n" if self.style == "crlf" else b"\n\n"
        return line + (b"[DONE]" if record is None else dumped) + end


def _compact(record: Any) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _json(record: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_compact(record), content_type="application/json")


def _error(status: int, text: str) -> web.Response:
    return _json({"error": {"message": text}}, status)


@asynccontextmanager
async def running_quill() -> AsyncIterator[FakeQuill]:
    quill = FakeQuill()
    await quill.start()
    try:
        yield quill
    finally:
        await quill.stop()
