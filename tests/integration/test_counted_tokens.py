"""What answers are charged: as many tokens as the engine has made, at every front, by every model and in every form.

Each engine logs its own count of what it has generated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.lab.engine.kserve import models
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from sidecar.shell.open_requests import Chosen, cancel
from tests.integration.test_openai_triton import CHAT, COMPLETIONS, client_of
from tests.integration.test_vllm import fronted
from tests.kit.emulated import add_tensor, core_request, read_served, running_engine, stream_answers, text_request
from tests.kit.peft_files import BASE_MODEL
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, serving, until
from tests.kit.vllm_emulated import running_vllm

LIMIT, ANSWER = 200, 60
ACCESS = {"limits": [{"tokens": "output", "tokens_per_day": LIMIT}]}
DUMMY = {"compute": "none", "shape": "tiny"}
PROMPT = "a prompt that is long enough to be seen"

Ask = Callable[[Serving], Awaitable[Any]]


class IsRefused(Exception):
    """The budget is used up."""


@asynccontextmanager
async def refusals() -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise IsRefused from error
        raise


def kserve(make: Callable[..., Any], *, unary: bool, tokens: int = ANSWER, **fields: Any) -> Ask:
    """Return what asks for a whole answer as a client of Triton does, and returns the answer."""
    outputs, more, typed = (fields.pop(name, ()) for name in ("outputs", "more", "typed"))

    async def ask(served: Serving) -> Any:
        request = make(PROMPT, tokens, **fields)
        for name in outputs:
            request.outputs.add(name=name)
        for name in more:
            add_tensor(request, name, "BOOL", np.array([[True]]))
        if typed:
            as_typed(request)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        async with refusals():
            if unary:
                return await stub.ModelInfer(request)
            answers = await stream_answers(stub, request)
        if any("tokens a day" in answer.error_message for answer in answers):
            raise IsRefused
        assert not [answer.error_message for answer in answers if answer.error_message]
        return answers[0].infer_response if answers else None

    return ask


async def lying(served: Serving) -> None:
    """Claim a prompt that is longer than what comes."""
    request = core_request(PROMPT, ANSWER, exclude_input=False)
    request.raw_input_contents[1] = (10_000).to_bytes(4, "little")
    async with refusals():
        answers = await stream_answers(service_pb2_grpc.GRPCInferenceServiceStub(served.channel), request)
    if "tokens a day" in answers[0].error_message:
        raise IsRefused


def as_typed(request: Any) -> None:
    """Move a request's contents into its typed fields."""
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            tensor.contents.bytes_contents.append(raw[4:])
        elif tensor.datatype == "BOOL":
            tensor.contents.bool_contents.extend(map(bool, raw))
        else:
            tensor.contents.int_contents.extend(np.frombuffer(raw, "<i4").tolist())
    del request.raw_input_contents[:]


def llmapi(exclude: bool, streaming: bool = False) -> Ask:
    async def ask(served: Serving) -> Any:
        request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="r")
        text = PROMPT.encode()
        request.inputs.add(name="text_input", datatype="BYTES", shape=(1,))
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        add_tensor(request, "sampling_param_max_tokens", "INT32", np.array([ANSWER], np.int32))
        add_tensor(request, "sampling_param_exclude_input_from_output", "BOOL", np.array([exclude]))
        add_tensor(request, "streaming", "BOOL", np.array([streaming]))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        async with refusals():
            answers = await stream_answers(stub, request)
        if "tokens a day" in answers[-1].error_message:
            raise IsRefused

    return ask


def generate(text: bool, stream: bool | None, tokens: int = ANSWER) -> Ask:
    async def ask(served: Serving) -> None:
        prompt: dict[str, Any] = {"text": PROMPT} if text else {"tokens": gateway_pb2.TokenIds(ids=range(1, 40))}
        request = gateway_pb2.GenerateRequest(**prompt, max_tokens=tokens, stream=stream)
        async with refusals():
            told = [message.origin.output_tokens async for message in served.gateway.Generate(request)]
        assert told[-1] == tokens

    return ask


def openai(path: str, stream: bool, model: str = BASE_MODEL, tokens: int = ANSWER) -> Ask:
    async def ask(served: Serving) -> None:
        body: dict[str, Any] = {"model": model, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
        async with client_of(served) as client:
            answer: httpx.Response = await client.post(path, json=body)
        if answer.status_code == 429:
            raise IsRefused
        assert answer.status_code == 200, answer.text
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == tokens
            assert "completion_tokens_estimated" not in answer.json()["usage"]

    return ask


async def output_tokens(served: Serving) -> tuple[int, int]:
    """Return what usage has counted, and how much of it is an estimate."""
    rows = (await admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(pb.UsageRequest(by=["tenant"]))).rows
    return sum(row.output_tokens for row in rows), sum(row.output_tokens_estimated for row in rows)


async def asked_until_refused(served: Serving, ask: Ask) -> int:
    count = 0
    try:
        while count < 10:
            await ask(served)
            count += 1
    except IsRefused:
        return count
    raise AssertionError(f"{count} answers of {ANSWER} tokens were let in by a limit of {LIMIT}")


UNARY = {"decoupled": False}
FORMS: list[tuple[str, dict[str, Any] | None, Ask, bool]] = [
    (f"{name}, {'unary' if unary else 'stream'}, {how}", {"decoupled": not unary, **engine}, ask, False)
    for unary in (True, False)
    for make, name in ((core_request, "core"), (text_request, "ensemble"))
    for how, engine, ask in (
        ("excluded", {}, kserve(make, unary=unary)),
        ("with the prompt", {}, kserve(make, unary=unary, exclude_input=False)),
        ("typed", {}, kserve(make, unary=unary, exclude_input=False, typed=True)),
        ("counted by the client", {}, kserve(make, unary=unary, more=["return_num_output_tokens"])),
    )
]
FORMS += [
    ("core, a prompt that is not there", {}, lying, False),
    ("ensemble, one output", UNARY, kserve(text_request, unary=True, outputs=["text_output"]), False),
    ("ensemble, one output with the prompt", {}, kserve(text_request, unary=False, outputs=["text_output"],
                                                        exclude_input=False), False),
    *((f"core, {output} alone, {engine}, {how}", engine, kserve(core_request, unary=bool(engine), outputs=[output],
                                                                **how), False)
      for output in ("cum_log_probs", "output_ids")
      for engine, how in ((UNARY, {}), (UNARY, {"exclude_input": False}), ({}, {}), ({}, {"streaming": True}))),
    *((f"ensemble, no such output, {engine}, {how}", engine, kserve(text_request, outputs=["context_logits"], **how),
       "older" in engine) for engine, how in ((UNARY, {"unary": True}), ({}, {"unary": False, "streaming": True}),
                                              (UNARY | {"older": True}, {"unary": True}))),
    ("ensemble of an older engine", {"older": True}, kserve(text_request, unary=False), True),
    ("LLM API", {"protocol": "llmapi"}, llmapi(True), True),
    ("LLM API with the prompt", {"protocol": "llmapi"}, llmapi(False), True),
    ("LLM API, streamed", {"protocol": "llmapi"}, llmapi(True, streaming=True), False),
    *((f"Generate {'text' if text else 'ids'} {stream} {engine}", engine, generate(text, stream), False)
      for text in (True, False) for stream, engine in ((False, {}), (True, {}), (None, {}), (None, UNARY))),
    *((f"OpenAI {path} {stream} {engine}", engine, openai(path, stream, base), False) for path in (COMPLETIONS, CHAT)
      for stream in (False, True) for engine, base in (({}, BASE_MODEL), (UNARY, BASE_MODEL), (None, "base"))),
]  # fmt: skip


@asynccontextmanager
async def fronting(
    folder: Path, engine: dict[str, Any] | None, access: Any, **options: Any
) -> AsyncIterator[tuple[Any, Serving]]:
    """Run a sidecar in front of an emulated Triton, or a vLLM if `engine` is None. Its log is `folder / "served"`."""
    (folder / "adapters").mkdir()
    options |= {"compute": "none", "served_log": folder / "served"}
    async with AsyncExitStack() as stack:
        if engine is None:
            emulated: Any = (await stack.enter_async_context(running_vllm(**options)))[0]
            served = fronted([emulated], folder, access=access)
        else:
            (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
            backend: dict[str, Any] = {"adapters_dir": str(folder / "shared")} if "protocol" in engine else {}
            backend["base_model"] = {"name": BASE_MODEL, "chat_template": str(folder)}
            emulated = await stack.enter_async_context(running_engine(**DUMMY | {"seats": 4} | options | engine))
            served = serving([emulated], access=access, backend=backend)
        yield emulated, await stack.enter_async_context(served)


@pytest.mark.parametrize(("engine", "ask", "is_estimated"), [form[1:] for form in FORMS], ids=[f[0] for f in FORMS])
async def test_an_answer_is_charged_what_the_engine_made(
    engine: dict[str, Any] | None, ask: Ask, is_estimated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit is not passed by more than one answer; usage has the engine's own count."""
    if engine is not None and "older" in engine:  # before 0.20
        engine = {name: value for name, value in engine.items() if name != "older"}
        monkeypatch.setattr(models, "_RETURN_FLAGS", models._RETURN_FLAGS[:4])
    async with fronting(tmp_path, engine, ACCESS) as (_, served):
        told = len(read_served(tmp_path / "served"))  # a vLLM may have been asked for a token, to tell its slots
        assert await asked_until_refused(served, ask) <= LIMIT // ANSWER + 1
        await until(lambda: not served.sidecar.gateway.tickets)
        made = sum(line["tokens"] for line in read_served(tmp_path / "served")[told:])
        assert await output_tokens(served) == (made, made if is_estimated else 0)


@pytest.mark.parametrize("unary", [True, False])
async def test_a_client_gets_no_output_that_it_has_not_asked_for(unary: bool, tmp_path: Path) -> None:
    """What the sidecar asks for its own count is left out; a client that asks for it gets it."""
    async with fronting(tmp_path, {"decoupled": not unary}, {}) as (_, served):
        plain = await kserve(text_request, unary=unary)(served)
        listed = await kserve(text_request, unary=unary, outputs=["text_output"])(served)
        told = await kserve(text_request, unary=unary, more=["return_num_output_tokens"])(served)
    for answer in (plain, listed):
        assert [output.name for output in answer.outputs] == ["text_output"]
        assert len(answer.raw_output_contents) == 1
    assert [output.name for output in told.outputs] == ["text_output", "num_output_tokens"]
    assert np.frombuffer(told.raw_output_contents[1], "<i4").tolist() == [ANSWER]


# Answers that are cut.

READ, LONG = 25, 1000


async def read_kserve(served: Serving) -> int:
    call = service_pb2_grpc.GRPCInferenceServiceStub(served.channel).ModelStreamInfer()
    await call.write(core_request(tokens=1000, streaming=True))
    for _ in range(READ):
        await call.read()
    call.cancel()
    return READ


async def read_generated(served: Serving) -> int:
    ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
    call = served.gateway.Generate(gateway_pb2.GenerateRequest(tokens=ids, max_tokens=1000))
    for _ in range(READ):
        await call.read()
    call.cancel()
    return READ


async def read_events(served: Serving) -> int:
    body = {"model": "base", "prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    tokens = 0
    async with client_of(served) as client, client.stream("POST", COMPLETIONS, json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                tokens += len(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            if tokens >= READ:
                break
    return tokens


async def is_charged(served: Serving, also: Sequence[Serving], tokens: int) -> None:
    """Check the budget and usage of a cancelled request, of which a client has got so many tokens."""
    await until(lambda: not any(each.sidecar.gateway.tickets or each.state.requests for each in (served, *also)))
    request = pb.ListLimitsRequest()
    (limit,) = (await admin_pb2_grpc.AccessStub(served.admin_channel).ListLimits(request)).limits
    assert limit.taken["tokens_per_day"] >= tokens
    assert sum([(await output_tokens(each))[0] for each in (served, *also)]) >= tokens


CANCEL = {"limits": [{"tokens": "output", "tokens_per_day": 100_000}]}


@pytest.mark.parametrize("read", [read_kserve, read_generated, read_events])
async def test_a_cancelled_stream_is_charged_what_its_client_got(
    read: Callable[[Serving], Awaitable[int]], tmp_path: Path
) -> None:
    async with fronting(tmp_path, None if read is read_events else {}, CANCEL, time_scale=0.2) as (_, served):
        await is_charged(served, (), await read(served))


CUTS: list[tuple[str, Any, Callable[..., Ask]]] = [
    ("vLLM", None, partial(openai, COMPLETIONS, False, "base")),
    ("OpenAI", UNARY, partial(openai, COMPLETIONS, False)),
    ("Generate", UNARY, partial(generate, True, None)),
    ("Generate, not streamed", {}, partial(generate, False, False)),
    ("KServe, not streamed", {}, partial(kserve, text_request, unary=False)),
    *((f"KServe, {cut}", UNARY, partial(kserve, core_request, unary=True)) for cut in ("left", "cancelled", "late")),
]


@pytest.mark.parametrize(("cut", "engine", "ask"), CUTS, ids=[cut[0] for cut in CUTS])
async def test_an_answer_at_once_that_is_cut_is_charged_about_what_the_engine_made(
    cut: str, engine: dict[str, Any] | None, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    """Its time says it, by an earlier answer's."""
    async with fronting(tmp_path, engine, CANCEL, time_scale=0.2) as (emulated, served):
        await ask(tokens=2 * ANSWER)(served)
        before, steps = (await output_tokens(served))[0], emulated.engine.counters.iteration_counter
        asking = asyncio.create_task(ask(tokens=LONG, **({"lora_deadline_ms": 1000} if "late" in cut else {}))(served))
        await until(lambda: asking.done() or emulated.engine.counters.iteration_counter >= steps + LONG // 4)
        if "cancelled" in cut:
            cancel(served.sidecar.gateway, Chosen(backend="trt-0"))
        elif "late" not in cut:
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await is_charged(served, (), before + 1)
        counted, estimated = await output_tokens(served)
        made = read_served(tmp_path / "served")[-1]["tokens"]
        assert made / 3 < estimated < min(LONG, 3 * made)
        assert estimated == counted - before


async def leave_unread(served: Serving) -> int:
    """Leave before an answer that comes all at once. Its engine has given none before, so all of it is charged."""
    asking = asyncio.create_task(openai(COMPLETIONS, False, "base", LONG)(served))
    await until(lambda: any(ticket.dispatched_ns for ticket in served.sidecar.gateway.tickets.values()))
    asking.cancel()
    return LONG


@pytest.mark.parametrize("read", [read_events, leave_unread])
async def test_a_cancelled_answer_of_another_replica_is_charged_what_its_client_got(
    read: Callable[[Serving], Awaitable[int]], tmp_path: Path
) -> None:
    (tmp_path / "adapters").mkdir()
    backend = {"adapters_dir": str(tmp_path / "shared")}
    async with (
        running(tmp_path / "redis") as redis,
        running_vllm(compute="none", time_scale=0.2) as (engine, _),
        replicas(2, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S, backend=backend, access=CANCEL) as pool,
    ):
        (other,) = [served for served in pool if not owned(served)]
        (owner,) = [served for served in pool if owned(served)]
        await is_charged(other, (owner,), await read(other))
