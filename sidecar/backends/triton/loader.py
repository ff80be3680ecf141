"""The loader process maps packed weights and sends them, so that the serving process never touches them.

Sending 300 MB by gRPC blocks a Python process's event loop for nearly a second, and building the message for two. So a
process of its own sends loads. It reads one JSON order a line from standard input and writes one JSON result a line to
standard output. Its parent is the only one that runs it, and it ends with its parent.

    python -m sidecar.backends.triton.loader
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from sidecar.backends import wire
from sidecar.files import read_regular

LOADS_AT_ONCE = 8
TEXT_MAX = 100_000


class Loader:
    """Carries out orders on a few threads. A backend keeps its channel until it asks for a newer connection."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str], tuple[int, grpc.Channel]] = {}
        """By address and model: what one backend has lost says nothing of another's loads at the same server."""
        self._calls: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE)

    def serve(self) -> None:
        """Read orders until the parent closes the pipe, then exit at once."""
        for line in sys.stdin:
            order = json.loads(line)
            if "cancel" in order:
                self._cancel(order["cancel"])
            else:
                self._threads.submit(self._carry_out, order)
        os._exit(0)

    def _cancel(self, load: int) -> None:
        with self._lock:
            call = self._calls.get(load)
        if call is not None:
            call.cancel()

    def _carry_out(self, order: dict[str, Any]) -> None:
        """Send a load and report how it ended. Whatever happens, the parent gets one line."""
        try:
            result: dict[str, Any] = {"error": self._send(order)}
        except grpc.RpcError as failure:
            result = _broken(failure, order["timeout_s"])
        except Exception as failure:  # noqa: BLE001 — the parent waits for an answer, and logs this one
            result = {"error": f"the loader process: {type(failure).__name__}: {failure}", "unanswered": True}
        if result["error"] is not None:
            result["error"] = _short(result["error"])
        with self._lock:
            self._calls.pop(order["load"], None)
        self._report(order["load"], **result)

    def _report(self, load: int, **record: Any) -> None:
        with self._lock:
            print(json.dumps({"load": load, **record}), flush=True)

    def _sending(self, order: dict[str, Any], message: bytes) -> Iterator[bytes]:
        """Yield the message to gRPC. It asks for another one once this one is sent: then the engine has it."""
        yield message
        self._report(order["load"], sent=True)

    def _send(self, order: dict[str, Any]) -> str | None:
        """Send one load. Return the engine's error text, or None if it succeeded.

        The serving process has just reached the server, so a channel that still backs off from an earlier failure waits
        for it instead of failing.
        """
        message = message_of(order)
        channel = self._channel(order)
        if order["decoupled"]:
            method = channel.stream_stream(
                f"{wire.SERVICE}/ModelStreamInfer",
                request_serializer=_unchanged,
                response_deserializer=wire.ModelStreamInferResponse.FromString,
            )
            call = method(self._sending(order, message), timeout=order["timeout_s"], wait_for_ready=True)
            self._keep(order["load"], call)
            for response in call:
                if response.error_message:
                    return str(response.error_message)
                if wire.is_final(response.infer_response.parameters):
                    return None
            return "the stream ended without an answer"
        unary = channel.unary_unary(
            f"{wire.SERVICE}/ModelInfer",
            request_serializer=_unchanged,
            response_deserializer=wire.ModelInferResponse.FromString,
        )
        future = unary.future(message, timeout=order["timeout_s"], wait_for_ready=True)
        self._keep(order["load"], future)
        self._report(order["load"], sent=True)
        future.result()
        return None

    def _keep(self, load: int, call: Any) -> None:
        with self._lock:
            self._calls[load] = call

    def _channel(self, order: dict[str, Any]) -> grpc.Channel:
        backend, connection = (order["address"], order["model"]), order["connection"]
        with self._lock:
            kept, channel = self._channels.get(backend, (0, None))
            if channel is None or kept < connection:
                if channel is not None:
                    channel.close()
                channel = _open_channel(order)
                self._channels[backend] = connection, channel
            return channel


def _broken(failure: Any, timeout_s: float) -> dict[str, Any]:
    """Return the result for a call that gRPC ended: the engine's error, a broken connection, or no answer in time."""
    code, text = failure.code(), failure.details() or str(failure.code())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return {"error": f"the engine did not take the adapter within {timeout_s:g} s", "unanswered": True}
    return {"error": text, "lost": wire.is_lost(code, text)}


def _short(text: str) -> str:
    """Cut a long text in its middle: the important part of a traceback is its end."""
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX // 2]} … {text[-TEXT_MAX // 2 :]}"


def _unchanged(message: bytes) -> bytes:
    return message


def _open_channel(order: dict[str, Any]) -> grpc.Channel:
    tls = order.get("tls")
    if tls is None:
        return grpc.insecure_channel(order["address"], options=wire.CHANNEL_OPTIONS)
    contents = [read_regular(Path(tls[name])) if tls.get(name) else None for name in ("ca", "key", "certificate")]
    credentials = grpc.ssl_channel_credentials(*contents)
    return grpc.secure_channel(order["address"], credentials, options=wire.CHANNEL_OPTIONS)


def message_of(order: dict[str, Any]) -> bytes:
    """Return the serialized request. Its weights are named by region, or copied once from the mapped file."""
    size, region = order["size_bytes"], order["region"]
    request = wire.load_head(order["model"], order["id"], order["parameters"])
    request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<Q", int(order["task_id"])))
    wire.add_weights(request, order["shape"], order["dtype"], base64.b64decode(order["config"]), region, size)
    if region is not None:
        return bytes(request.SerializeToString())
    head = request.SerializeToString() + wire.content_head(size)
    with Path(order["path"]).open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as weights:
        return b"".join((head, memoryview(weights)[:size]))


if __name__ == "__main__":
    # Signals to the whole group, as from a terminal or systemd, are for the parent: it drains, then closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Loader().serve()
