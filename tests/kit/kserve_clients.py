"""Drive the unmodified tritonclient: with asyncio, and with threads and a stream's callback."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import np_to_triton_dtype

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2

CORE, ENSEMBLE = "tensorrt_llm", "ensemble"
DUMMY = {"compute": "none", "shape": "tiny"}
PATIENCE_S = 60
GRPCS_OWN = ("Internal error from Core", "Stream removed")
"""What grpc.aio tells a client that writes in the very moment in which its stream or its connection closes."""


def tensor(name: str, values: Any, dtype: Any) -> triton.InferInput:
    """Return an input with the shape of the values."""
    array = np.array(values, dtype)
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def core_inputs(tokens: int = 4, prompt: int = 5, streaming: bool = True) -> list[triton.InferInput]:
    """Return the inputs of a request to `tensorrt_llm`: a prompt of some token ids."""
    return [
        tensor("input_ids", [[BOS, *range(prompt - 1)]], np.int32),
        tensor("input_lengths", [[prompt]], np.int32),
        tensor("request_output_len", [[tokens]], np.int32),
        tensor("streaming", [[streaming]], bool),
        tensor("exclude_input_in_output", [[True]], bool),
    ]


def text_inputs(tokens: int = 4, prompt: str = "hello", streaming: bool = True) -> list[triton.InferInput]:
    """Return the inputs of a request to `ensemble`."""
    return [
        tensor("text_input", [[prompt.encode()]], object),
        tensor("max_tokens", [[tokens]], np.int32),
        tensor("stream", [[streaming]], bool),
        tensor("exclude_input_in_output", [[True]], bool),
    ]


def inputs_of(model: str, tokens: int = 4, streaming: bool = True) -> list[triton.InferInput]:
    return core_inputs(tokens, streaming=streaming) if model == CORE else text_inputs(tokens, streaming=streaming)


def stop_inputs() -> list[triton.InferInput]:
    """Return the inputs that cancel an earlier request of the same id, with dummy tensors."""
    return [*core_inputs(1, 1)[:3], tensor("stop", [[True]], bool)]


@dataclass
class Told:
    """The answers to one request, or on one stream."""

    responses: list[Any] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, result: triton.InferResult | None, error: Exception | None) -> None:
        if error is not None:
            self.errors.append(str(getattr(error, "message", lambda: error)()))
        if result is not None:
            self.responses.append(result.get_response())

    def tokens(self, client_id: str | None = None) -> list[int]:
        """Return the tokens of the answers, of one id or of all; letters for text."""
        return [t for r in self.responses if client_id in (None, r.id) for t in tokens_of(r)]

    @property
    def last(self) -> dict[str, Any]:
        """The parameters of the last response."""
        return parameters_of(self.responses[-1])


def tokens_of(response: Any) -> list[int]:
    result = triton.InferResult(response)
    ids = result.as_numpy("output_ids")
    if ids is not None:
        return list(ids.reshape(-1).tolist())
    texts = result.as_numpy("text_output")
    return [] if texts is None else [letter for text in texts.reshape(-1) for letter in text]


def parameters_of(response: Any) -> dict[str, Any]:
    """Return a response's parameters as plain values."""
    return {
        name: getattr(value, str(value.WhichOneof("parameter_choice"))) for name, value in response.parameters.items()
    }


@asynccontextmanager
async def aio_client(address: str, **options: Any) -> AsyncIterator[triton_aio.InferenceServerClient]:
    client = triton_aio.InferenceServerClient(address, **options)
    try:
        yield client
    finally:
        await client.close()


async def ask(
    client: triton_aio.InferenceServerClient,
    model: str = CORE,
    name: str | None = None,
    tokens: int = 4,
    *,
    headers: dict[str, str] | None = None,
    **request: Any,
) -> Told:
    """Send one request on its own stream and collect its answers."""
    parameters = ({} if name is None else {"lora_name": name}) | request.pop("parameters", {})
    fields = {"model_name": model, "inputs": inputs_of(model, tokens), "parameters": parameters} | request
    return await ask_all(client, [fields], headers)


async def ask_all(
    client: triton_aio.InferenceServerClient, requests: Sequence[dict[str, Any]], headers: dict[str, str] | None = None
) -> Told:
    """Send requests on one stream and collect answers until all have ended."""

    async def each() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield request

    told = Told()
    async for result, error in client.stream_infer(each(), headers=headers):
        told.add(result, error)
    return told


class OpenStream:
    """An open stream: send requests and take answers at any time."""

    def __init__(self, client: triton_aio.InferenceServerClient, headers: dict[str, str] | None = None) -> None:
        self._requests: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._answers = client.stream_infer(self._each(), headers=headers)

    async def _each(self) -> AsyncIterator[dict[str, Any]]:
        while (request := await self._requests.get()) is not None:
            yield request

    def send(
        self, name: str, request_id: str, tokens: int = 4, model: str = CORE, inputs: Any = None, **request: Any
    ) -> None:
        parameters = {"lora_name": name} | request.pop("parameters", {})
        inputs = inputs_of(model, tokens) if inputs is None else inputs
        self._requests.put_nowait(
            {"model_name": model, "request_id": request_id, "inputs": inputs, "parameters": parameters} | request
        )

    def stop(self, request_id: str) -> None:
        self._requests.put_nowait({"model_name": CORE, "request_id": request_id, "inputs": stop_inputs()})

    async def take(self) -> tuple[Any, str | None]:
        """Return the next answer: a response, or an error's message."""
        async with asyncio.timeout(PATIENCE_S):
            result, error = await anext(self._answers)
        return (None, error.message()) if error is not None else (result.get_response(), None)

    async def take_final(self, request_id: str) -> Told:
        """Take answers until the final one of a request; return those of this request."""
        told = Told()
        while True:
            response, error = await self.take()
            if error is not None:
                told.errors.append(error)
                return told
            if response.id != request_id:
                continue
            told.responses.append(response)
            if parameters_of(response).get("triton_final_response"):
                return told

    async def rest(self) -> Told:
        """Close our side and collect the remaining answers."""
        self._requests.put_nowait(None)
        told = Told()
        async with asyncio.timeout(PATIENCE_S):
            async for result, error in self._answers:
                told.add(result, error)
        return told

    def cancel(self) -> None:
        self._answers.cancel()


@contextmanager
def sync_stream(address: str, **options: Any) -> Iterator[tuple[triton.InferenceServerClient, queue.Queue[Any]]]:
    """Open a stream of the threaded client; its callback puts answers into the queue."""
    client = triton.InferenceServerClient(address, **options)
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        yield client, answers
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def sync_told(answers: queue.Queue[Any], finals: int) -> Told:
    """Collect a callback's answers until `finals` requests have ended."""
    told = Told()
    while finals:
        result, error = answers.get(timeout=PATIENCE_S)
        told.add(result, error)
        ended = error is not None or parameters_of(result.get_response()).get("triton_final_response", False)
        finals -= ended
    return told


async def in_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    """Return the error with which a call of grpc.aio ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


async def restrict(served: Any, folder: Path, tenant: str) -> None:
    """Allow only one tenant to use the adapter of a folder, under the folder's name, even if it is managed."""
    await served.adapters.Register(
        admin_pb2.RegisterRequest(name=folder.name, path=str(folder), allow=[tenant], hold_s=3600)
    )
