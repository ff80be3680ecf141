"""What trtllm-serve's answers mean, without a server: errors by text, metrics that reading empties, members of bodies.

The texts are those of TensorRT-LLM's source; most come with status 400, whoever is to blame.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sidecar.backends.http_client import HttpClient
from sidecar.backends.openai.dialect import Measures
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.naming import Lora
from sidecar.backends.openai.server import OpenAiServer
from sidecar.backends.openai.trtllm import DIALECT, why_not_client
from sidecar.core.enums import Fault
from sidecar.errors import Misused

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        # Missing files: stage them, and once more.
        ("1 validation error:\n  {'type': 'value_error', 'loc': ('body', 'lora_request'), 'msg': 'Value error, "
         "lora_path (/adapters/x) does not exist.'}", Fault.MISS),
        ("Failed to load LoRA adapter: [Errno 2] No such file or directory: '/a/x/adapter_config.json'", Fault.MISS),
        ("LoRA task 7 not found in cache. Please send LoRA weights with request", Fault.MISS),
        # A bad adapter, of which the engine does not end.
        ("Failed to load LoRA adapter: Error while deserializing header: HeaderTooLarge", Fault.REJECTED),
        ("Failed to load LoRA adapter: 'unsupported key base_model.x from HF LoRA weights'", Fault.REJECTED),
        ("Failed to load LoRA adapter: Layer 0 is missing required 'out' matrix (lora_B equivalent)", Fault.REJECTED),
        # A bad adapter, of which it does.
        ("Invalid low_rank (128). low_rank must be smaller than mMaxLowRank (64)", Fault.DEADLY),
        ("lora module 8 not enabled for this model", Fault.DEADLY),
        ("has to few values for lora weights", Fault.DEADLY),
        ("Expected layerId to be in the range [0, 32)", Fault.DEADLY),
        ("Expected LoRA weights dtype to match the model's", Fault.DEADLY),
        # More adapters at once than its graphs have slots.
        ("Currently do not support batch with more LoRA task ID than loRA slot size!", Fault.FULL),
        # A full host cache, which ends it.
        ("PEFT Cache is full. Could not store taskId=7", Fault.LOST),
        ("Cache is full. There are no done tasks to evict", Fault.LOST),
        ("Caught exception during copyTask ensure batch", Fault.LOST),
        # The engine is gone.
        ("Event loop terminated unexpectedly", Fault.LOST),
        ("Fatal error in the executor loop", Fault.LOST),
        ("Hang detected on rank 0", Fault.LOST),
        # The client is to blame.
        ("1 validation error:\n  {'type': 'extra_forbidden', 'loc': ('body', 'guided_json')}", Fault.REJECTED),
        ("`default_max_tokens` (-3) must be greater than 0, `default_max_tokens` is ...", Fault.REJECTED),
        ("The sum of prompt length (900), query length (0) should not exceed max_num_tokens (512)", Fault.REJECTED),
        ("Token ID 99 out of vocabulary range [0, 64)", Fault.REJECTED),
    ],
)  # fmt: skip
def test_an_error_is_classified_by_its_text(text: str, fault: Fault) -> None:
    assert DIALECT.fault_of(400, text) is fault
    assert DIALECT.fault_of(500, text) is fault


def test_503_is_the_end_of_an_engine() -> None:
    assert DIALECT.fault_of(503, "LLM is unavailable. Please check the server logs for more details.") is Fault.LOST
    assert DIALECT.fault_of(503, "Service Unavailable") is Fault.LOST


@pytest.mark.parametrize("text", ["Invalid low_rank", "PEFT Cache is full", "lora_path does not exist", "Fatal error"])
def test_what_the_client_wrote_itself_does_not_count(text: str) -> None:
    assert DIALECT.fault_of(400, f"validation error: {text}", lambda part: part in text) is Fault.REJECTED


@pytest.mark.parametrize(
    "body",
    [
        b'{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}',
        b'{"error":"no"}',
        b'{"error":{"message":"no","type":"server_error","code":500}}',
    ],
)
def test_all_forms_of_error_bodies_are_read(body: bytes) -> None:
    assert message_of(body) == "no"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "member", ["guided_json", "return_token_ids", "structured_outputs", "kv_transfer_params", "store"]
)
def test_what_only_others_know_is_refused_by_name(path: str, member: str) -> None:
    assert why_not_client(path, ["model", "max_tokens", member]) == (
        member,
        f'trtllm-serve has no "{member}"; leave it out, or ask for an adapter that vLLM serves',
    )


def test_a_misspelt_member_is_told_what_was_meant() -> None:
    assert why_not_client(COMPLETIONS, ["model", "max_token"]) == (
        "max_token",
        'trtllm-serve has no "max_token"; did you mean "max_tokens"?',
    )
    assert "leave it out" in why_not_client(COMPLETIONS, ["max_completion_token"])[1]  # of chats only


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_names_no_adapter_to_the_engine_itself(path: str) -> None:
    member, reason = why_not_client(path, ["model", "lora_request"])
    assert member == "lora_request"
    assert 'name it in "model"' in reason


def test_members_belong_to_a_path() -> None:
    assert why_not_client(COMPLETIONS, ["model", "prompt", "detokenize"]) == ("", "")
    assert why_not_client(CHAT, ["model", "messages", "tools", "top_logprobs"]) == ("", "")
    assert why_not_client(CHAT, ["model", "prompt"])[0] == "prompt"
    assert why_not_client(COMPLETIONS, ["model", "messages"])[0] == "messages"


# The server's own questions, to one that answers as its source does.

Answers = Callable[[str, bytes], tuple[int, Any]]
"""Returns the status and the record that answer a request, by its path and body."""
T = TypeVar("T")


def asked(answer: Answers, question: Callable[[OpenAiServer], Coroutine[Any, Any, T]]) -> T:
    async def handle(request: web.Request) -> web.Response:
        status, record = answer(request.path, await request.read())
        return web.Response(status=status, text=record if isinstance(record, str) else json.dumps(record))

    async def ask() -> T:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        async with TestServer(app) as server, HttpClient(f"{server.host}:{server.port}") as client:
            return await question(OpenAiServer("e0", client))

    return asyncio.run(ask())


def always(status: int, record: Any) -> Answers:
    return lambda path, body: (status, record)


def test_metrics_are_read_from_their_newest_record() -> None:
    records = [
        {"iter": number, "numActiveRequests": 2, "kvCacheStats": {"maxNumBlocks": 64, "usedNumBlocks": 3,
         "tokensPerBlock": 32}} for number in (7, 8)
    ]  # fmt: skip
    expected = Measures(steps=8, kv_tokens=2048, kv_used=96, inside=2)
    assert asked(always(200, records), DIALECT.measures) == expected


@pytest.mark.parametrize("body", ["[]", "{}", "nothing", '[{"iter":"x"}]', "[3]"])
def test_metrics_that_say_nothing_are_unknown(body: str) -> None:
    assert asked(always(200, body), DIALECT.measures) == Measures()


def test_the_front_of_a_disaggregated_server_is_refused() -> None:
    def answer(path: str, body: bytes) -> tuple[int, Any]:
        return (200, {"is_ready": True}) if path == "/cluster_info" else (404, {"detail": "Not Found"})

    with pytest.raises(Misused, match="the front of a disaggregated trtllm-serve, which is not served"):
        asked(answer, DIALECT.served)


def test_a_part_of_a_disaggregated_server_is_refused() -> None:
    record = {"disaggregated_params": {"ctx_dp_rank": 0}, "max_batch_size": 8}
    with pytest.raises(Misused, match="computes prompts or answers only"):
        asked(always(200, record), DIALECT.seats)


def test_another_server_is_told_by_its_answer() -> None:
    record = {"object": "list", "data": [{"id": "llama", "owned_by": "vllm"}]}

    def answer(path: str, body: bytes) -> tuple[int, Any]:
        return (200, record) if path == "/v1/models" else (404, "")

    with pytest.raises(Misused, match="not as trtllm-serve does"):
        asked(answer, DIALECT.served)


def test_seats_are_unknown_to_older_servers() -> None:
    assert asked(always(404, {"detail": "Not Found"}), DIALECT.seats) is None
    assert asked(always(200, {"max_batch_size": 16}), DIALECT.seats) == 16


def test_a_question_names_the_adapter_as_the_server_wants_it() -> None:
    bodies = []

    def answer(path: str, body: bytes) -> tuple[int, Any]:
        bodies.append(json.loads(body))
        return 200, {"choices": [{"index": 0, "text": "", "token_ids": [4, 5]}]}

    lora = Lora("a@0", 2**63 - 1, "/adapters/k")
    body = DIALECT.one_token("base") | {"prompt": [3, 4], "max_tokens": 2, DIALECT.lora_member: lora.record}
    assert asked(answer, lambda server: server.ask(body, 1.0)) == (200, "[4, 5]")
    assert bodies[0]["lora_request"] == {
        "lora_name": "a@0", "lora_int_id": 2**63 - 1, "lora_path": "/adapters/k",
    }  # fmt: skip
    assert (bodies[0]["prompt"], bodies[0]["max_tokens"], bodies[0].get("stream")) == ([3, 4], 2, None)
