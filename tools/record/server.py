"""A server that is asked: a real one, or the emulated one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx

from tools.record.copies import Copies
from tools.record.forms import answer_form, event_form

PROMPT = "The quick brown fox jumps over"
TOKENS = 8
_ID_BITS = 62


class Server:
    """Where questions go. `patience_s` without a word counts as hanging; numbers of adapters are never used twice."""

    def __init__(self, url: str, copies: Copies | None, patience_s: float, max_rank: int, slots: int) -> None:
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        self.max_rank = max_rank
        self.slots = slots
        self.era = ""
        self._copies = copies
        self._http = httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(60, read=120))

    @property
    def copies(self) -> Copies:
        """Makes adapters. Only questions about adapters use it, which are not asked without one."""
        assert self._copies is not None
        return self._copies

    @property
    def has_adapter(self) -> bool:
        """True if adapters can be asked for."""
        return self._copies is not None

    def new_number(self) -> int:
        """Return a number that no adapter has had."""
        return secrets.randbits(_ID_BITS) | 1

    async def get(self, path: str) -> httpx.Response:
        """Return the answer to a GET."""
        return await self._http.get(path)

    async def post(self, path: str, body: Any, timeout_s: float | None = None) -> httpx.Response:
        """Return the answer to a POST."""
        return await self._http.post(path, json=body, timeout=timeout_s or httpx.USE_CLIENT_DEFAULT)

    async def complete(self, folder: Path | None = None, number: int | None = None, **fields: Any) -> httpx.Response:
        """Return a short completion, by an adapter under a number (a new one) or by the base model."""
        return await self.post("/v1/completions", self.body(folder, number) | fields)

    async def text(self, folder: Path | None = None, number: int | None = None, **fields: Any) -> str:
        """Return the text of a greedy completion; for an error, what it says."""
        answer = await self.complete(folder, number, **fields)
        if answer.status_code != httpx.codes.OK:
            return f"{answer.status_code}: {answer.text}"
        return str(answer.json()["choices"][0]["text"])

    def body(self, folder: Path | None = None, number: int | None = None) -> dict[str, Any]:
        """Return the body of a short greedy completion."""
        body: dict[str, Any] = {"model": "record", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        if folder is None:
            return body
        return body | {"lora_request": lora(number or self.new_number(), folder)}

    def chat_body(self, folder: Path | None = None, number: int | None = None) -> dict[str, Any]:
        """Return the body of a short greedy chat."""
        body = self.body(folder, number)
        del body["prompt"]
        return body | {"messages": [{"role": "user", "content": PROMPT}]}

    async def stream_form(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the form of a stream: its status, its events with runs of equal ones as one, and how it ends."""
        text, end = "", "closed"
        async with self._http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                return answer_form(answer)
            try:
                async for piece in answer.aiter_text():
                    text += piece
            except httpx.TransportError:
                end = "broken"
        events = [event_form(event) for event in text.split("\n\n") if event]
        return {"status": 200, "events": [each for each, _ in groupby(events)], "end": end}

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def lora(number: Any, folder: Path | str) -> dict[str, Any]:
    """Return the field that names an adapter."""
    return {"lora_name": "record", "lora_int_id": number, "lora_path": str(folder)}
