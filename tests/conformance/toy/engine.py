"""The engine of the backend kind `toy`: a tiny server in the caller's event loop, with a protocol of its own.

A client opens a connection for each question and writes one line of JSON; the engine answers with lines of JSON and
closes. `hello` says what it is, `load` and `forget` take and drop an adapter, `run` and `infer` answer a prompt.

An answer depends on the adapter's content and the prompt only: `answer(content, prompt, count)` are its tokens. The
engine keeps `slots` adapters and evicts the one that was used least recently; it answers `seats` prompts at a time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tritonclient.grpc import service_pb2

LINE_BYTES_MAX = 1 << 24
VOCABULARY = 1000
WEIGHTS_FILE = "adapter_model.safetensors"


def content_of(folder: Path) -> str:
    """Return what an adapter's files contain, as a short digest."""
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()[:12]


def answer(content: str, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens of an answer; `content` is "" for the base model, `prompt` a text's bytes or token ids."""
    return [zlib.crc32(f"{content} {list(prompt)} {at}".encode()) % VOCABULARY for at in range(count)]


def text_of(tokens: Sequence[int]) -> str:
    """Return tokens as text."""
    return "".join(f"w{token} " for token in tokens)


class Wrong(Exception):
    """A question that the engine refuses. `code` is `miss`, `full` or `rejected`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class ToyEngine:
    """One engine. After `kill` a `start` comes up at the same address, with no adapter.

    `speaks` is `toy` or `kserve`; `step_s` is the time that a token takes.
    """

    def __init__(self, speaks: str = "toy", slots: int = 2, seats: int = 4, step_s: float = 0.0, port: int = 0) -> None:
        self.speaks = speaks
        self.slots = slots
        self.seats = seats
        self.step_s = step_s
        self.adapters: dict[str, str] = {}
        """The content of each adapter that is loaded, by name, the least recently used first."""
        self.steps = 0
        self.running: list[str] = []
        """The adapters of the prompts that are being answered, "" for the base model."""
        self._port = port
        self._starts = 0
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Host and port, known after the first `start`."""
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Begin to listen."""
        self._starts += 1
        self.adapters, self.steps, self.running = {}, 0, []
        self._free = asyncio.Semaphore(self.seats)
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, limit=LINE_BYTES_MAX)
        self._port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Break every connection and listen no more."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for handler in list(self._handlers):
                handler.cancel()
            await asyncio.gather(*self._handlers, return_exceptions=True)

    def lose_adapters(self) -> None:
        """Evict every adapter, as a cache may at any time."""
        self.adapters.clear()

    # A connection.

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            question = json.loads(await reader.readline())
            answering = asyncio.create_task(self._answer(question, writer))
            gone = asyncio.create_task(reader.read(1))  # the client closes: it has its answer, or wants none any more
            try:
                await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (answering, gone):
                    task.cancel()
                await asyncio.gather(answering, gone, return_exceptions=True)
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # it is gone, it was no question, or the engine is killed
        finally:
            self._handlers.discard(handler)
            writer.transport.abort() if self._server is None else writer.close()

    async def _answer(self, question: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        def say(record: dict[str, Any]) -> None:
            writer.write(json.dumps(record).encode() + b"\n")

        try:
            match question["do"]:
                case "hello":
                    say({
                        "engine": "toy", "speaks": self.speaks, "start": self._starts, "slots": self.slots,
                        "seats": self.seats, "steps": self.steps, "adapters": len(self.adapters),
                    })  # fmt: skip
                case "load":
                    self._load(question["name"], Path(question["path"]))
                    say({})
                case "forget":
                    self.adapters.pop(question["name"], None)
                    say({})
                case "run":
                    await self._run(question, say, writer)
                case "infer":
                    await self._infer(question, say, writer)
        except Wrong as wrong:
            say({"error": str(wrong), "code": wrong.code})
        with suppress(OSError):
            await writer.drain()

    # Adapters.

    def _load(self, name: str, folder: Path) -> None:
        try:
            content = content_of(folder)
        except OSError as error:
            raise Wrong("rejected", f"{folder} cannot be read: {error.strerror}") from error
        self.adapters.pop(name, None)
        for other in [key for key in self.adapters if key not in self.running]:
            if len(self.adapters) < self.slots:
                break
            del self.adapters[other]
        if len(self.adapters) >= self.slots:
            raise Wrong("full", f"all {self.slots} slots are in use")
        self.adapters[name] = content

    def _content(self, name: str) -> str:
        if not name:
            return ""
        if name not in self.adapters:
            raise Wrong("miss", f"adapter {name} is not loaded")
        self.adapters[name] = content = self.adapters.pop(name)  # the most recently used is the last
        return content

    # Prompts.

    async def _tokens(self, adapter: str, prompt: Sequence[int], count: int) -> Any:
        """Yield the tokens of an answer one by one."""
        async with self._free:
            tokens = answer(self._content(adapter), prompt, count)
            self.running.append(adapter)
            try:
                for token in tokens:
                    await asyncio.sleep(self.step_s)
                    self.steps += 1
                    yield token
            finally:
                self.running.remove(adapter)

    async def _replies(self, adapter: str, prompt: Sequence[int], count: int, streams: bool) -> Any:
        """Yield the tokens of each reply, and whether it is the last."""
        if count < 1:
            raise Wrong("rejected", f"max_tokens is {count}; at least 1 is taken")
        tokens: list[int] = []
        async for token in self._tokens(adapter, prompt, count):
            tokens.append(token)
            if streams:
                yield [token], len(tokens) == count
        if not streams:
            yield tokens, True

    async def _run(self, question: dict[str, Any], say: Any, writer: asyncio.StreamWriter) -> None:
        ask = question["ask"]
        prompt = ask["prompt"].encode() if isinstance(ask["prompt"], str) else ask["prompt"]
        async for tokens, end in self._replies(question["adapter"], prompt, ask["max_tokens"], ask["stream"]):
            say({"tokens": tokens, "text": text_of(tokens), "end": end})
            await writer.drain()

    async def _infer(self, question: dict[str, Any], say: Any, writer: asyncio.StreamWriter) -> None:
        """Answer a `ModelInferRequest` with the inputs `text_input` and `max_tokens`."""
        request = service_pb2.ModelInferRequest.FromString(base64.b64decode(question["message"]))
        inputs = dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=False))
        if not {"text_input", "max_tokens"} <= inputs.keys():
            raise Wrong("rejected", "the request needs text_input and max_tokens in raw_input_contents")
        (count,) = struct.unpack_from("<i", inputs["max_tokens"])
        async for tokens, end in self._replies(
            question["adapter"], inputs["text_input"][4:], count, question["stream"]
        ):
            response = service_pb2.ModelInferResponse(model_name=request.model_name)
            response.parameters["triton_final_response"].bool_param = end
            text = text_of(tokens).encode()
            response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
            response.raw_output_contents.append(struct.pack("<I", len(text)) + text)
            response.outputs.add(name="sequence_length", datatype="INT32", shape=[1])
            response.raw_output_contents.append(struct.pack("<i", len(tokens)))
            message = base64.b64encode(response.SerializeToString()).decode()
            say({"message": message, "tokens": len(tokens), "end": end})
            await writer.drain()
