"""What vLLM answers to requests, on vLLM and on the emulator's face: bodies, events, refusals, metrics."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from tests.e2e.vllm.direct import complete, completion, load, metrics
from tests.e2e.vllm.faces import CONTEXT, MISSING, UNFIT, Face, assert_error, events_of, pattern_of, to_json
from tests.e2e.vllm.installed import chosen

CHOICE = '{"index":0,"text":"…","logprobs":null,"finish_reason":%s,"stop_reason":null,'
NEWER, IN_CHUNKS = (
    ("", "") if chosen().version == "0.32.0" else (',"weight_versions":null', ',"kv_transfer_params":null')
)
"""What 0.33 adds to choices and to chunks."""
WHOLE = (
    '{"id":"…","object":"text_completion","created":"…","model":"sql","choices":['
    + CHOICE % '"length"'
    + '"token_ids":%s,"prompt_logprobs":null,"prompt_token_ids":%s,"routed_experts":null'
    + NEWER
    + '}],"service_tier":null,"system_fingerprint":"…",'
    '"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,'
    '"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,'
    '"ec_transfer_params":null,"metrics":null}'
)
CHUNK = (
    '{"id":"…","object":"text_completion","created":"…","model":"sql","choices":['
    + CHOICE
    + '"prompt_token_ids":%s,"token_ids":%s'
    + NEWER
    + "}]%s"
    + IN_CHUNKS
    + "}"
)
USAGE = (
    '{"id":"…","object":"%s","created":"…","model":"sql","choices":[],"usage":{"prompt_tokens":%d,"total_tokens":%d,'
    '"completion_tokens":3},"system_fingerprint":"…"}'
)
PROMPT = [3, 4, 5]


async def test_completions(face: Face, client: httpx.AsyncClient) -> None:
    """Whole and in events, with and without token ids, with and without what it took."""
    await load(client, "sql", face.adapter())
    tokens = await complete(client, "sql", PROMPT, 3)

    async def told(**fields: Any) -> str:
        reply = await client.post("/v1/completions", json=completion("sql", PROMPT, 3, **fields))
        kind = "text/event-stream; charset=utf-8" if fields.get("stream") else "application/json"
        assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
        return reply.text

    assert pattern_of(await told()) == WHOLE % (to_json(tokens), to_json(PROMPT))
    assert pattern_of(await told(return_token_ids=False)) == WHOLE % ("null", "null")
    *chunks, done = events_of(await told(stream=True, return_token_ids=False))
    assert done == "[DONE]"
    last = CHUNK % ('"length"', "null", "null", ',"system_fingerprint":"…"')
    assert_chunks(chunks, CHUNK % ("null", "null", "null", ""), last)
    *chunks, usage, done = events_of(await told(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [token for choice in choices for token in choice["token_ids"]] == tokens
    assert [choice["prompt_token_ids"] for choice in choices] == [PROMPT] + [None] * (len(choices) - 1)
    shown = [re.sub(r'_ids":(null|\[[\d,]+\])', r'_ids":"…"', pattern_of(chunk)) for chunk in chunks]
    assert_patterns(shown, CHUNK % ("null", '"…"', '"…"', ""), CHUNK % ('"length"', '"…"', '"…"', ""))
    assert pattern_of(usage) == USAGE % ("text_completion", 3, 6)


def assert_chunks(chunks: list[str], going: str, last: str) -> None:
    """Each chunk is as told, and the last one. A server that is behind puts several tokens into one."""
    assert_patterns([pattern_of(chunk) for chunk in chunks], going, last)


def assert_patterns(shown: list[str], going: str, last: str) -> None:
    assert 1 <= len(shown) <= 3
    assert shown == [going] * (len(shown) - 1) + [last]


async def test_several_prompts(face: Face, client: httpx.AsyncClient) -> None:
    """Each has a choice of its own."""
    await load(client, "sql", face.adapter())
    both = [PROMPT, [7, 8]]
    reply = await client.post("/v1/completions", json=completion("sql", both, 2))  # type: ignore[arg-type]
    alone = [await complete(client, "sql", one, 2) for one in both]
    assert [choice["token_ids"] for choice in reply.json()["choices"]] == alone
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1]
    assert reply.json()["usage"]["prompt_tokens"] == 5


CHAT = (
    '{"id":"…","object":"chat.completion","created":"…","model":"sql","choices":[{"index":0,"message":{"role":"assistant",'
    '"content":"…","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,'
    '"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null'
    + NEWER
    + '}],"service_tier":null,"system_fingerprint":"…",'
    '"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":3,'
    '"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,'
    '"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
)
CHAT_CHUNK = '{"id":"…","object":"chat.completion.chunk","created":"…","model":"sql","choices":[{"index":0,"delta":'
DELTA_END = '"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}'
FIRST_DELTA = '{"role":"assistant","content":"…"},' + DELTA_END


async def test_chats(face: Face, client: httpx.AsyncClient) -> None:
    """Whole and in events, of which the first only says the role."""
    await load(client, "sql", face.adapter())
    asked = {"model": "sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    asked["ignore_eos"] = True
    reply = await client.post("/v1/chat/completions", json=asked)
    prompt = reply.json()["usage"]["prompt_tokens"]
    assert pattern_of(reply.text) == CHAT % (prompt, prompt + 3)
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events_of((await client.post("/v1/chat/completions", json=streamed)).text)
    assert done == "[DONE]"
    first, *rest = chunks
    assert pattern_of(first) == CHAT_CHUNK + FIRST_DELTA
    going = CHAT_CHUNK + '{"content":"…"},"logprobs":null,"finish_reason":null,"token_ids":null}]' + IN_CHUNKS + "}"
    last = (
        CHAT_CHUNK
        + '{"content":"…"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null'
        + NEWER
        + "}]"
        + IN_CHUNKS
        + "}"
    )
    assert_chunks(rest, going, last)
    assert pattern_of(usage) == USAGE % ("chat.completion.chunk", prompt, prompt + 3)


async def test_refused_requests(face: Face, client: httpx.AsyncClient) -> None:
    """An unknown model, no prompt, a length that is none, a prompt that is too long; an answer that is, is cut."""
    await load(client, "sql", face.adapter())
    unknown = "The model `nobody` does not exist. Valid aliases: base."
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body in (
        ("/v1/completions", completion("nobody", PROMPT, 3)),
        ("/v1/chat/completions", {"model": "nobody", **chat}),
    ):
        assert_error(await client.post(path, json=body), MISSING, unknown, "model")
    cases = [
        (
            completion("sql", [5] * 1200, 3),
            "This model's maximum context length is 1024 tokens. However, your prompt contains 1200 input tokens, "
            "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
            "(parameter=input_tokens, value=1200)",
            "input_tokens",
        ),
        (
            completion("sql", PROMPT, -1),
            "max_tokens must be at least 1, got -1. (parameter=max_tokens, value=-1)",
            "max_tokens",
        ),
        (
            {"model": "sql"},
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
            "prompt",
        ),
        (
            completion("sql", "", 3),
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
            "prompt",
        ),
        (completion("sql", [99999], 3), "Token id 99999 is out of vocabulary", None),
    ]
    for body, message, param in cases:
        assert_error(await client.post("/v1/completions", json=body), UNFIT, message, param)
    assert len(await complete(client, "sql", [5] * (CONTEXT - 24), 24)) == 24
    cut = (await client.post("/v1/completions", json=completion("sql", [5] * (CONTEXT - 24), 100))).json()
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 24)


async def test_other_routes(face: Face, client: httpx.AsyncClient) -> None:
    """Health and version; what there is not."""
    for path in ("/health", "/ping"):
        assert ((reply := await client.get(path)).status_code, reply.text) == (200, "")
    assert (await client.get("/version")).json() == {"version": chosen().version}
    assert ((reply := await client.get("/v1/nothing")).status_code, reply.json()) == (404, {"detail": "Not Found"})
    assert ((reply := await client.get("/v1/completions")).status_code, reply.headers["allow"]) == (405, "POST")


async def test_metrics(face: Face, client: httpx.AsyncClient) -> None:
    """Steps, waiting by reason, the adapters' activity with a series for every combination, the KV cache's size."""
    for number in range(2):
        await load(client, f"m{number}", face.adapter(number))
    before = await metrics(client)
    for number in (0, 1, 0):
        await complete(client, f"m{number}", PROMPT, 4)
    after = await metrics(client)
    assert after.steps - before.steps == 12
    assert after.tokens - before.tokens == 3 * (3 + 4)
    lines = (await client.get("/metrics")).text.splitlines()
    for reason in ("capacity", "deferred"):
        labels = f'engine="0",model_name="base",reason="{reason}"'
        assert f"vllm:num_requests_waiting_by_reason{{{labels}}} 0.0" in lines
    busy = [f'vllm:lora_requests_info{{max_lora="2",running_lora_adapters="{name}",waiting_lora_adapters="{name}"}}'
            for name in ("m0", "m1", "")]  # fmt: skip
    times = [[float(line.split()[-1]) for line in lines if line.startswith(f"{series} ")] for series in busy]
    assert [len(one) for one in times] == [1, 1, 1], "one series each, for ever"
    (first,), (second,), (idle,) = times
    assert second <= first <= idle
    (cache,) = [line for line in lines if line.startswith("vllm:cache_config_info{")]
    assert 'block_size="128"' in cache
    assert 'num_gpu_blocks="' in cache
    assert any(line.startswith("process_start_time_seconds ") for line in lines)
    assert any(line.startswith('vllm:kv_cache_usage_perc{engine="0",model_name="base"} ') for line in lines)
