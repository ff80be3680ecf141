"""The emulated trtllm-serve's API: bodies and events key by key as its source writes them, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from sidecar.lab.engine.tokens import ByteTokenizer
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until
from tests.kit.trtllm_emulated import BASE, Client, body_of, chat_body_of, expected, lora, running_trtllm

DUMMY = {"compute": "none", "max_seq_tokens": 1024}
OLD = DUMMY | {"era": "1.2"}
ERAS = pytest.mark.parametrize("options", [DUMMY, OLD], ids=["main", "1.2"])
HELLO = [256, *b"hello"]
TEXT = ByteTokenizer().decode(expected(None, 64))
CHAT_PROMPT_TOKENS = len([256, *b"user: hi\nassistant: "])


def normal(body: str) -> str:
    """A body without what is different every time."""
    body = re.sub(r'"id":"(cmpl|chatcmpl)-[0-9a-f]{32}"', r'"id":"\1-UUID"', body)
    return re.sub(r'"created":\d+', '"created":0', body)


async def body_from(client: Client, path: str, **body: Any) -> str:
    answer = await client.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return normal(answer.text)


def compact(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def usage(prompt: int, tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


@ERAS
async def test_what_an_operator_asks(options: dict[str, Any]) -> None:
    """Health, version, the base model alone; statistics of iterations only where they are kept, and once."""
    is_main = options is DUMMY
    async with running_trtllm(**options) as (_, client):
        get, post = client.http.get, client.http.post
        health = await get("/health")
        assert (health.status_code, health.content) == (200, b"")
        assert (await get("/version")).json() == {"version": "1.3.0rc22" if is_main else "1.2.1"}
        (card,) = (await get("/v1/models")).json()["data"]
        assert card | {"created": 0} == {"id": BASE, "object": "model", "created": 0, "owned_by": "tensorrt_llm"}
        assert (await get("/server_info")).status_code == (200 if is_main else 404)
        assert (await get("/metrics")).text == "[]"
        assert (await post("/kv_cache_events")).text == "[]"
        assert (await get("/prometheus/metrics")).status_code == 404
        for path in ("/nothing", "/v1/load_lora_adapter", "/v1/responses"):
            answer = await post(path)
            assert (answer.status_code, answer.text) == (404, '{"detail":"Not Found"}')
        assert (await get("/v1/completions")).status_code == 405
        tried = await get("/health_generate")
        assert (tried.status_code, tried.text) == (200, "Generation health check OK")


async def test_iteration_statistics() -> None:
    """An array that reading drains; what is fetched but not scheduled counts as active."""
    async with running_trtllm(**DUMMY, iteration_stats=True, perf_metrics=True, seats=7) as (_, client):
        await client.tokens(tokens=3)
        entries = (await client.http.get("/metrics")).json()
        assert [entry["iter"] for entry in entries] == [1, 2, 3]
        first, last = entries[0], entries[-1]
        assert first["maxNumActiveRequests"] == 7
        batches = [entry["inflightBatchingStats"] for entry in (first, last)]
        assert [
            (
                each["numScheduledRequests"],
                each["numContextRequests"],
                each["numGenRequests"],
                each["numPausedRequests"],
            )
            for each in batches
        ] == [(1, 1, 0, 0), (1, 0, 1, 0)]
        assert (last["numActiveRequests"], last["numQueuedRequests"]) == (0, 0)
        assert {"maxNumBlocks", "freeNumBlocks", "usedNumBlocks", "tokensPerBlock"} <= set(last["kvCacheStats"])
        assert (await client.http.get("/metrics")).text == "[]", "they are told once"
        text = (await client.http.get("/prometheus/metrics")).text
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_utilization"):
            assert f"trtllm_{name}{{" in text
        assert "lora" not in text


@ERAS
async def test_a_whole_completion(options: dict[str, Any]) -> None:
    """All keys, in their order; `model` is the request's string, whatever it is; ids take the text's place."""
    choice = {
        "index": 0, "text": TEXT[:2], "token_ids": None, "logprobs": None, "context_logits": None,
        "finish_reason": "length", "stop_reason": None, "disaggregated_params": None,
        "avg_decoded_tokens_per_iter": 1.0,
    }  # fmt: skip
    body = {
        "id": "cmpl-UUID", "object": "text_completion", "created": 0, "model": "sql", "choices": [choice],
        "usage": usage(6, 2), "prompt_token_ids": None,
    }  # fmt: skip
    asked = body_of(None, "", tokens=2) | {"model": "sql"}
    async with running_trtllm(**options) as (_, client):
        assert await body_from(client, "/v1/completions", **asked) == compact(body)
        choice |= {"text": "", "token_ids": expected(None, 2)}
        assert await body_from(client, "/v1/completions", **asked | {"prompt": HELLO, "detokenize": False}) == compact(
            body
        )
        two = json.loads(await body_from(client, "/v1/completions", **asked | {"prompt": ["hello", "hi"]}))
        assert (two["model"], two["usage"], two["prompt_token_ids"]) == (BASE, usage(9, 4), [])
        assert [each["index"] for each in two["choices"]] == [0, 1]
        echoed = json.loads(await body_from(client, "/v1/completions", **asked | {"echo": True}))
        assert echoed["choices"][0]["text"] == "hello" + TEXT[:2]


def chunk(text: str, end: str | None = None, **rest: Any) -> dict[str, Any]:
    choice = {
        "index": 0, "text": text, "token_ids": None, "logprobs": None, "finish_reason": end, "stop_reason": None,
        "avg_decoded_tokens_per_iter": 1.0,
    }  # fmt: skip
    return {
        "id": "ID", "object": "text_completion", "created": 0, "model": BASE, "choices": [choice | rest], "usage": None,
    }  # fmt: skip


def events(*contents: Any) -> str:
    return "".join(f"data: {compact(content)}\n\n" for content in contents) + "data: [DONE]\n\n"


@ERAS
async def test_a_streamed_completion(options: dict[str, Any]) -> None:
    """Nulls are written. Counts come only with stream options, then unless declined; in 1.2 with each event."""
    asked = body_of(None, "", tokens=2) | {"stream": True}
    last = {"id": "ID", "object": "text_completion", "created": 0, "model": BASE, "choices": [], "usage": usage(6, 2)}
    first, second = chunk(TEXT[0]), chunk(TEXT[1], "length")
    async with running_trtllm(**options) as (_, client):

        async def told(**fields: Any) -> str:
            body = await body_from(client, "/v1/completions", **asked | fields)
            return re.sub(r'"id":"cmpl-(\d+|UUID)"', '"id":"ID"', body)

        assert await told() == events(first, second)
        counted = (first | {"usage": usage(6, 1)}, second | {"usage": usage(6, 2)}, last)
        once = (first, second, last)
        assert await told(stream_options={"continuous_usage_stats": False}) == events(*once)
        assert await told(stream_options={}) == events(*(once if options is DUMMY else counted))
        assert await told(stream_options={"include_usage": False}) == events(first, second)
        assert await told(stream_options={"continuous_usage_stats": True}) == events(*counted)
        one, two = expected(None, 2)
        assert await told(detokenize=False) == events(chunk("", token_ids=[one]), chunk("", "length", token_ids=[two]))
        stopped = await told(stop=TEXT[1], max_tokens=9)
        assert stopped == events(first, chunk("", "stop", stop_reason=TEXT[1]))


async def test_ids_of_streams() -> None:
    """Main numbers requests in the process and keeps an answer's id; 1.2 makes a new one for each event."""
    found = {}
    for era in ("main", "1.2"):
        async with running_trtllm(**DUMMY, era=era) as (_, client):
            found[era] = [[event["id"] for event in (await client.events())[:-1]] for _ in range(2)]
    assert found["main"] == [["cmpl-1"] * 4, ["cmpl-2"] * 4]
    old = [name for answer in found["1.2"] for name in answer]
    assert len(set(old)) == 8
    assert all(re.fullmatch(r"cmpl-[0-9a-f]{32}", name) for name in old)


@ERAS
async def test_chat(options: dict[str, Any]) -> None:
    """A whole answer has all keys; a stream's events only those with a value, and the first one ends with a space."""
    is_main = options is DUMMY
    message = {
        "role": "assistant", "content": TEXT[:2], "reasoning_content": "", "reasoning": None, "tool_calls": [],
    }  # fmt: skip
    choice = {
        "index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None,
        "mm_embedding_handle": None, "disaggregated_params": None, "avg_decoded_tokens_per_iter": 1.0,
    }  # fmt: skip
    body: dict[str, Any] = {
        "id": "chatcmpl-UUID", "object": "chat.completion", "created": 0, "model": BASE, "choices": [choice],
        "usage": usage(CHAT_PROMPT_TOKENS, 2), "prompt_token_ids": None,
    }  # fmt: skip
    asked = chat_body_of(None, "", tokens=2)
    head = {"id": "ID", "object": "chat.completion.chunk", "created": 0, "model": BASE}

    def event(**rest: Any) -> str:
        return compact(head | {"choices": [{"index": 0, **rest}]})

    deltas = [{"content": text, "reasoning_content": ""} for text in TEXT[:2]]
    async with running_trtllm(**options) as (_, client):
        whole = await body_from(client, "/v1/chat/completions", **asked)
        assert whole == compact(body | {"prompt_token_ids_b64": None} if is_main else body)
        once = {"continuous_usage_stats": False}
        said = await body_from(client, "/v1/chat/completions", **asked, stream=True, stream_options=once)
        said = re.sub(r'"id":"chatcmpl-(\d+|UUID)"', '"id":"ID"', said)
        assert said == (
            f"data: {event(delta={'role': 'assistant'})} \n\n"
            f"data: {event(delta=deltas[0], avg_decoded_tokens_per_iter=1.0)}\n\n"
            f"data: {event(delta=deltas[1], finish_reason='length', avg_decoded_tokens_per_iter=1.0)}\n\n"
            f"data: {compact(head | {'choices': [], 'usage': usage(CHAT_PROMPT_TOKENS, 2)})}\n\n"
            "data: [DONE]\n\n"
        )
        ids = chat_body_of(None, "", tokens=2) | {"prompt_token_ids": HELLO, "max_completion_tokens": 3}
        del ids["max_tokens"]
        assert (await client.http.post("/v1/chat/completions", json=ids)).json()["usage"] == usage(6, 3)


async def test_the_length_of_answers() -> None:
    """Without max_tokens it is all that the context leaves; more is cut to that; a prompt that leaves nothing fails."""
    async with running_trtllm(**DUMMY | {"max_seq_tokens": 40}) as (_, client):
        for tokens in (None, 1000):
            answer = (await client.complete(tokens=tokens)).json()
            assert (answer["usage"], answer["choices"][0]["finish_reason"]) == (usage(6, 34), "length")
        for prompt, text in ((["x" * 39], "`default_max_tokens` (0) must be greater than 0"), ([7] * 50, "(-10)")):
            refused = await client.complete(prompt=prompt)
            assert refused.status_code == 400
            assert text in refused.json()["message"]
    async with running_trtllm(**DUMMY, max_tokens_per_step=16) as (_, client):
        refused = await client.complete(prompt="x" * 20)
        assert refused.json()["message"].startswith("The sum of prompt length (21)")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"logit_bias": {"999": 1}}, "Token ID 999 out of vocabulary range [0, 259)"),
    "bias key": ({"logit_bias": {"x": 1}}, "Invalid logit_bias key 'x'"),
    "tokens": ({"prompt": [5000]}, "Token ID out of range"),
    "max_tokens": ({"max_tokens": 0}, "`max_tokens` (0) must be greater than 0"),
    "greedy n": ({"n": 2, "temperature": 0}, "Greedy decoding in the LLM API does not allow multiple returns."),
    "no prompt": ({"prompt": []}, "list index out of range"),
    "beams": ({"use_beam_search": True}, "use_beam_search is not available"),
}
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"adapter": "x"}, "{'type': 'extra_forbidden', 'loc': ('body', 'adapter'), 'msg': 'Extra inputs are "
                "not permitted', 'input': 'x'}"),
    "of vLLM": ({"return_token_ids": True}, "'loc': ('body', 'return_token_ids')"),
    "in lora_request": ({"lora_request": {"lora_name": "a", "lora_int_id": 1, "lora_path": "/", "rank": 8}},
                        "'loc': ('body', 'lora_request', 'rank')"),
    "source": ({"lora_request": {"lora_name": "a", "lora_int_id": 1, "lora_path": "/", "lora_ckpt_source": "x"}},
               "'loc': ('body', 'lora_request', 'lora_ckpt_source')"),
    "no id": ({"lora_request": {"lora_name": "a", "lora_path": "/"}}, "'loc': ('body', 'lora_request', 'lora_int_id')"),
    "no path": ({"lora_request": {"lora_name": "a", "lora_int_id": 1}}, "Value error, lora_path () does not exist."),
    "suffix": ({"suffix": "x"}, "suffix is not supported"),
    "options": ({"stream_options": {"include_usage": True}}, "Stream options can only be defined when stream is true."),
}  # fmt: skip


@ERAS
async def test_refusals(options: dict[str, Any]) -> None:
    """All with 400. Invalid bodies have a form of their own in main."""
    async with running_trtllm(**options) as (server, client):
        for name, (fields, text) in REFUSED.items():
            answer = await client.complete(**{"tokens": 2, "prompt": "hello"} | fields)
            error = answer.json()
            assert (answer.status_code, list(error)) == (400, ["object", "message", "type", "param", "code"]), name
            assert error | {"message": ""} == {
                "object": "error", "message": "", "type": "BadRequestError", "param": None, "code": 400,
            }  # fmt: skip
            assert text in error["message"]
        for name, (fields, text) in INVALID.items():
            answer = await client.complete(**fields)
            error = answer.json()
            assert (answer.status_code, next(iter(error))) == (400, "error" if options is DUMMY else "object"), name
            told = error["error"] if options is DUMMY else error["message"]
            assert told.startswith("1 validation error:\n  {'type': ")
            assert text in told
        bad = await client.http.post("/v1/completions", content="{nope")
        assert "'type': 'json_invalid', 'loc': ('body', 1)" in bad.text
        assert (await client.http.post("/v1/completions", json=[])).status_code == 500
        assert not server.served


async def test_numbers_as_strings(tmp_path: Any) -> None:
    """ "7" is 7: the same adapter as the number's."""
    folder = write_adapter(tmp_path / "a", seed=1)
    other = write_adapter(tmp_path / "b", seed=2)
    async with running_trtllm(**DUMMY) as (_, client):
        named = lora(7, folder) | {"lora_int_id": "7"}
        assert await client.tokens(lora_request=named) == expected(folder, 4)
        assert await client.tokens(7, other) == expected(folder, 4)


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_is_noticed(streamed: bool) -> None:
    """The server looks once a second; then the engine is rid of the request."""
    async with running_trtllm(**DUMMY | {"max_seq_tokens": 1_000_000, "kv_blocks": 200_000}) as (server, client):
        body = body_of(None, "", tokens=900_000) | {"stream": streamed}
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", timeout=60) as leaving:
            if streamed:
                async with leaving.stream("POST", "/v1/completions", json=body) as answer:
                    await anext(answer.aiter_lines())
            else:
                task = asyncio.create_task(leaving.post("/v1/completions", json=body))
                await until(lambda: server.engine.counters.active == 1)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await until(lambda: bool(server.served) and not server.engine.counters.active)
        assert server.served[-1].outcome == "cancelled"
        assert await client.tokens(tokens=2) == expected(None, 2)


async def test_the_openai_library(tmp_path: Any) -> None:
    """Its unmodified clients read what the server sends, with the adapter in their extra body."""
    folder = write_adapter(tmp_path / "a")
    text = ByteTokenizer().decode(expected(folder, 4))
    async with running_trtllm(**DUMMY) as (server, _):
        extra = {"lora_request": lora(5, folder)}
        async with openai.AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="x") as sdk:
            whole = await sdk.completions.create(model="sql", prompt="hello", max_tokens=4, extra_body=extra)
            assert (whole.choices[0].text, whole.model, whole.usage and whole.usage.total_tokens) == (text, "sql", 10)
            stream = await sdk.chat.completions.create(
                model="sql",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            pieces = [piece async for piece in stream]
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
            assert pieces[-1].usage is not None
            with pytest.raises(openai.BadRequestError):
                await sdk.completions.create(model="sql", prompt="hello", max_tokens=0)
