"""The demo's requests, and the checks of their answers."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.faults import classify
from sidecar.backends.wire import ModelInferRequest, is_final
from sidecar.core.enums import Fault
from sidecar.lab.demo import merged
from sidecar.lab.demo.model import MAX_TOKENS
from sidecar.lab.engine.tokens import BOS, EOS, ByteTokenizer
from sidecar.proto import gateway_pb2, gateway_pb2_grpc


@dataclass(frozen=True)
class Answer:
    """One answer and where it came from, with the expected tokens."""

    adapter: str
    prompt: str
    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    backend: str
    cache: str
    load_ms: float

    @property
    def text(self) -> str:
        return ByteTokenizer().decode(list(self.tokens))

    @property
    def right(self) -> bool:
        return self.tokens == self.expected


async def ask_by_id(address: str, task_ids: Sequence[int], prompt: str) -> Counter[str]:
    """Send requests straight to an engine by task id only, as a client without a sidecar would; count the endings."""
    endings: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for task_id in task_ids:
            request = _request_by_id(task_id, prompt)
            async for response in stub.ModelStreamInfer(iter([request])):
                missed = classify(response.error_message) is Fault.MISS
                if response.error_message:
                    endings["not found in cache" if missed else response.error_message] += 1
                if response.error_message or is_final(response.infer_response.parameters):
                    break
    return endings


def _request_by_id(task_id: int, prompt: str) -> ModelInferRequest:
    tokens = [BOS, *prompt.encode()]
    request = ModelInferRequest(model_name="tensorrt_llm", id=str(task_id))
    for name, values in (("input_ids", tokens), ("input_lengths", [len(tokens)]), ("request_output_len", [MAX_TOKENS])):
        request.inputs.add(name=name, datatype="INT32", shape=[1, len(values)])
        request.raw_input_contents.append(struct.pack(f"<{len(values)}i", *values))
    request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<Q", task_id))
    return request


async def ask_by_name(
    address: str, asked: Sequence[tuple[str, str]], folder: Path, checked: Callable[[int], None]
) -> list[Answer]:
    """Ask the sidecar for each (adapter, prompt), all at once; "" is the base model. `checked` is told how many are."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        asking = [asyncio.create_task(_ask(stub, adapter, prompt, folder)) for adapter, prompt in asked]
        for task in asking:
            task.add_done_callback(lambda _: checked(sum(each.done() for each in asking)))
        return list(await asyncio.gather(*asking))


async def _ask(stub: gateway_pb2_grpc.GatewayStub, adapter: str, prompt: str, folder: Path) -> Answer:
    ids = gateway_pb2.TokenIds(ids=[BOS, *prompt.encode()])
    request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=ids, max_tokens=MAX_TOKENS)
    tokens: list[int] = []
    origin = gateway_pb2.Origin()
    async for response in stub.Generate(request):
        tokens += response.token_ids
        if response.HasField("origin"):
            origin = response.origin
    expected = await asyncio.to_thread(merged.greedy, folder / adapter if adapter else None, prompt, MAX_TOKENS)
    return Answer(adapter, prompt, _to_end(tokens), _to_end(expected), origin.backend, origin.cache, origin.load_ms)


def _to_end(tokens: list[int]) -> tuple[int, ...]:
    """Drop the end token, which engines may or may not send."""
    return tuple(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def failures(answers: Sequence[Answer]) -> list[str]:
    """Return the failures: answers that differ from the merged model's, and adapters with equal answers to a prompt."""
    wrong = [
        f'{answer.adapter or "base model"} answered "{answer.text}" instead of '
        f'"{ByteTokenizer().decode(list(answer.expected))}"'
        for answer in answers
        if not answer.right
    ]
    alike = [
        f"{first.adapter or 'base model'} and {second.adapter or 'base model'} answered alike"
        for first, second in combinations(answers, 2)
        if first.prompt == second.prompt and first.adapter != second.adapter and first.tokens == second.tokens
    ]
    return wrong + alike
