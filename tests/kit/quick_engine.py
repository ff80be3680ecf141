"""An engine that costs next to nothing: as much of vLLM's API as the sidecar uses, and answers that the prompt orders.

It computes nothing and knows no time but the one it is told, so what is measured or broken before it is the proxies'
doing. A prompt is an `Order` as JSON; `answer_of` returns the same bytes to whoever has the order. As a program it
serves one engine until SIGTERM:

python -m tests.kit.quick_engine [HOST [LINES]]

with so many lines of histograms in its metrics.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

SLOTS = 64
ENGINE = "x-engine"
"""The header of an answer that tells the engine's address."""
DONE = b"data: [DONE]\n\n"
WHOLE, SPLIT = "whole", "split"
"""Chunks: an answer in one; events cut anywhere. Without either, each event is a chunk."""


@dataclass(frozen=True)
class Order:
    """What an answer is to be: `events`, the seed of their bytes, how they are cut, and milliseconds between chunks.

    Without a gap chunks follow one another at once, each sent by itself; a whole answer is one write. With seed 0 all
    events are alike.
    """

    events: int
    seed: int = 0
    cut: str = ""
    gap_ms: float = 0.0

    @property
    def prompt(self) -> str:
        return json.dumps(asdict(self))


def events_of(order: Order) -> list[bytes]:
    """Return the answer's events."""
    if not order.seed:
        return [event(f"{'token ':<8}")] * order.events
    chosen = random.Random(order.seed)
    return [event("x" * chosen.choice((1, 4, 12, 700))) for _ in range(order.events)]


def event(text: str) -> bytes:
    # As vLLM's of a completion, without the fields that a proxy has no eye for.
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    record = {"id": "cmpl-1", "object": "text_completion", "created": 1, "choices": [choice]}
    return b"data: " + json.dumps(record, separators=(",", ":")).encode() + b"\n\n"


@lru_cache(4096)
def answer_of(order: Order) -> bytes:
    """Return the whole body of an answer."""
    return b"".join(events_of(order)) + DONE


@lru_cache(4096)
def chunks_of(order: Order) -> Sequence[bytes]:
    """Return the answer as it is cut."""
    if order.cut != SPLIT:
        events = events_of(order)
        return [*events, DONE]
    body, chosen = answer_of(order), random.Random(order.seed + 1)
    cuts = sorted({0, len(body), *(chosen.randrange(1, len(body)) for _ in range(1 + order.events // 2))})
    return [body[begin:end] for begin, end in pairwise(cuts)]


class QuickEngine:
    """Its state: the adapters that were loaded, and what its metrics count. Answers tell its address."""

    def __init__(self, address: str, histogram_lines: int = 0) -> None:
        self.address = address
        self._histograms = "".join(
            f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="{n}.0",model_name="base"}} {n}.0\n'
            for n in range(histogram_lines)
        )
        self.adapters: dict[str, str] = {}
        self.running = self.steps = self.tokens = 0

    def reply(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and content of what is no completion."""
        if path == "/version":
            return 200, {"version": "0.33.0"}
        if path == "/v1/models":
            cards = [{"id": "base", "max_model_len": 1 << 20}]
            return 200, {"data": cards + [{"id": n, "root": p, "parent": "base"} for n, p in self.adapters.items()]}
        if path == "/metrics":
            return 200, (
                f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
                f"vllm:iteration_tokens_total_count {self.steps}\nvllm:generation_tokens_total {self.tokens}\n"
                f'vllm:lora_requests_info{{max_lora="{SLOTS}"}} 1\nprocess_start_time_seconds 1\n' + self._histograms
            )
        if path == "/v1/load_lora_adapter":
            record = json.loads(body)
            self.adapters[record["lora_name"]] = record["lora_path"]
        elif path == "/v1/unload_lora_adapter":
            self.adapters.pop(json.loads(body)["lora_name"], None)
        elif path != "/health":
            return 404, {"error": {"message": f"there is no {path}"}}
        return 200, "Success"


class Connection(asyncio.Protocol):
    """A client's: one request at a time, with a content-length or in chunks."""

    def __init__(self, engine: QuickEngine) -> None:
        self._engine = engine
        self._held = b""
        self._writing: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if self._writing is not None:
            self._writing.cancel()

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, found, rest = self._held.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "chunked" in headers.get("transfer-encoding", ""):
            if (taken := unchunked(rest)) is None:
                return
            body, self._held = taken
        else:
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            body, self._held = rest[:length], rest[length:]
        self._answer(first.split(" ")[1], body)

    def _answer(self, path: str, body: bytes) -> None:
        if path != "/v1/completions":
            status, content = self._engine.reply(path, body)
            raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self._whole(status, raw, "text/plain" if isinstance(content, str) else "application/json")
            return
        if not body:
            self._whole(405, b"{}", "application/json")
            return
        record = json.loads(body)
        if record["model"] != "base" and record["model"] not in self._engine.adapters:
            error = {"error": {"message": f"The model `{record['model']}` does not exist."}}
            self._whole(404, json.dumps(error).encode(), "application/json")
        elif not record.get("stream"):
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            whole = {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": usage}
            self._whole(200, json.dumps(whole).encode(), "application/json")
        else:
            self._writing = asyncio.create_task(self._stream(Order(**json.loads(record["prompt"]))))

    def _whole(self, status: int, raw: bytes, content_type: str) -> None:
        head = f"content-type: {content_type}\r\ncontent-length: {len(raw)}\r\n\r\n"
        self._transport.write(self._begin(status) + head.encode() + raw)

    def _begin(self, status: int) -> bytes:
        return f"HTTP/1.1 {status} -\r\n{ENGINE}: {self._engine.address}\r\n".encode()

    async def _stream(self, order: Order) -> None:
        head = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        self._engine.running += 1
        try:
            await self._chunks(self._begin(200) + head, order)
        finally:
            self._engine.running -= 1

    async def _chunks(self, head: bytes, order: Order) -> None:
        if order.cut == WHOLE:
            self._engine.steps += 1
            self._engine.tokens += order.events
            self._transport.write(head + chunked(answer_of(order)) + chunked(b""))
            return
        loop = asyncio.get_running_loop()
        self._transport.write(head)
        due_s = loop.time()
        for chunk in chunks_of(order):
            self._engine.steps += 1
            self._engine.tokens += 1
            self._transport.write(chunked(chunk))
            due_s += order.gap_ms / 1e3
            await asyncio.sleep(max(0.0, due_s - loop.time()))  # at least what is written is sent
        self._transport.write(chunked(b""))


def chunked(data: bytes) -> bytes:
    """Return a chunk of HTTP/1.1; of nothing, the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def unchunked(raw: bytes) -> tuple[bytes, bytes] | None:
    """Return a chunked body and what follows it; None if it is not whole yet."""
    parts, at = [], 0
    while True:
        end = raw.find(b"\r\n", at)
        if end < 0:
            return None
        size = int(raw[at:end], 16)
        at = end + 2 + size + 2
        if len(raw) < at:
            return None
        if size == 0:
            return b"".join(parts), raw[at:]
        parts.append(raw[end + 2 : end + 2 + size])


async def serve(host: str = "127.0.0.1", histogram_lines: str = "0") -> None:
    """Serve on a free port until SIGTERM, and print where."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: else Nagle stays on
    listening.bind((host, 0))
    engine = QuickEngine(f"{host}:{listening.getsockname()[1]}", int(histogram_lines))
    server = await loop.create_server(lambda: Connection(engine), sock=listening, backlog=4096)
    print(json.dumps({"http": engine.address}), flush=True)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    serving = serve(*sys.argv[1:])
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)
