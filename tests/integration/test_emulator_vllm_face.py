"""The emulated vLLM's API: bodies and streams key by key as vLLM 0.32.0 was seen to write them, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from sidecar.lab.engine.http.text import GeneratedText, Stops
from sidecar.lab.engine.tokens import EOS, ByteTokenizer
from tests.kit.serving import until
from tests.kit.vllm_emulated import BASE, DONE, Client, expected, running_vllm, texts_of

DUMMY = {"compute": "none", "max_seq_tokens": 1024}
HELLO = [256, *b"hello"]
TEXT = ByteTokenizer().decode(expected("", None, 64))
ASKED = {"model": BASE, "prompt": "hello", "max_tokens": 2, "temperature": 0}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
CHAT_PROMPT = [256, *b"user: hi\nassistant: "]


def normal(body: str) -> str:
    """A body without what is different every time."""
    body = re.sub(r'"id":"(cmpl|chatcmpl|modelperm)-[0-9a-f]{16}"', r'"id":"\1"', body)
    return re.sub(r"vllm-0\.32\.0-[0-9a-f]{8}", "PRINT", re.sub(r'"created":\d+', '"created":0', body))


async def body_of(client: Client, path: str, **body: Any) -> str:
    answer = await client.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return normal(answer.text)


def compact(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def events(*contents: Any) -> str:
    return "".join(f"data: {compact(content)}\n\n" for content in contents) + "data: [DONE]\n\n"


async def test_what_an_operator_asks() -> None:
    """Health, version, models; addresses and methods that there are not."""
    async with running_vllm(**DUMMY, served_model_name=(BASE, "alias")) as (_, client):
        assert [(await client.http.get(path)).status_code for path in ("/health", "/ping", "/metrics")] == [200] * 3
        assert (await client.http.post("/ping")).content == b""
        assert (await client.http.get("/version")).text == '{"version":"0.32.0"}'
        for path in ("/nothing", "/v1/models/base"):
            answer = await client.http.get(path)
            assert (answer.status_code, answer.text) == (404, '{"detail":"Not Found"}')
        wrong = await client.http.get("/v1/completions")
        assert (wrong.status_code, wrong.text) == (405, '{"detail":"Method Not Allowed"}')
        cards = await client.models()
        assert list(cards) == [BASE, "alias"]
        assert [(card["parent"], card["max_model_len"]) for card in cards.values()] == [(None, 1024)] * 2
        assert (await client.complete("alias")).json()["model"] == BASE
        assert (await client.complete("", tokens=1)).json()["model"] == BASE


async def test_a_whole_completion() -> None:
    """All keys, in their order, whether they say something or not."""
    choice = {
        "index": 0, "text": TEXT[:2], "logprobs": None, "finish_reason": "length", "stop_reason": None,
        "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None,
    }  # fmt: skip
    usage = {
        "prompt_tokens": 6, "total_tokens": 8, "completion_tokens": 2, "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }  # fmt: skip
    body = {
        "id": "cmpl", "object": "text_completion", "created": 0, "model": BASE, "choices": [choice],
        "service_tier": None, "system_fingerprint": "PRINT", "usage": usage, "kv_transfer_params": None,
        "ec_transfer_params": None, "metrics": None,
    }  # fmt: skip
    async with running_vllm(**DUMMY) as (_, client):
        assert await body_of(client, "/v1/completions", **ASKED) == compact(body)
        choice |= {"token_ids": expected("", None, 2), "prompt_token_ids": HELLO}
        assert await body_of(client, "/v1/completions", **ASKED, return_token_ids=True) == compact(body)
        named = await client.http.post("/v1/completions", json=ASKED, headers={"x-request-id": "mine"})
        assert named.json()["id"] == "cmpl-mine"


def chunk(text: str, ids: Sequence[int] | None, prompt: Sequence[int] | None = None, end: str | None = None) -> Any:
    choice = {
        "index": 0, "text": text, "logprobs": None, "finish_reason": end, "stop_reason": None,
        "prompt_token_ids": prompt, "token_ids": ids,
    }  # fmt: skip
    return {"id": "cmpl", "object": "text_completion", "created": 0, "model": BASE, "choices": [choice]}


async def test_a_streamed_completion() -> None:
    """The fingerprint is in the last chunk, the counts' if there is one; counts with every chunk if they were asked."""
    first, second = expected("", None, 2)
    mark = {"system_fingerprint": "PRINT"}
    counts = [{"prompt_tokens": 6, "total_tokens": 6 + n, "completion_tokens": n} for n in (1, 2)]
    last = {"id": "cmpl", "object": "text_completion", "created": 0, "model": BASE, "choices": []}
    async with running_vllm(**DUMMY) as (_, client):
        asked = ASKED | {"stream": True}
        plain = await body_of(client, "/v1/completions", **asked)
        assert plain == events(chunk(TEXT[0], None), chunk(TEXT[1], None, end="length") | mark)
        ids = await body_of(client, "/v1/completions", **asked, return_token_ids=True)
        assert ids == events(chunk(TEXT[0], [first], HELLO), chunk(TEXT[1], [second], end="length") | mark)
        options = {"include_usage": True}
        usage = await body_of(client, "/v1/completions", **asked, stream_options=options)
        end = chunk(TEXT[1], None, end="length")
        assert usage == events(chunk(TEXT[0], None), end, last | {"usage": counts[1]} | mark)
        always = await body_of(
            client, "/v1/completions", **asked, stream_options=options | {"continuous_usage_stats": True}
        )
        begun = chunk(TEXT[0], None) | {"usage": counts[0]}
        assert always == events(begun, end | {"usage": counts[1]}, last | {"usage": counts[1]} | mark)


async def test_chat() -> None:
    """The template's prompt, a first chunk that names the role, and other keys than a completion's."""
    first, second = expected("", None, 2)
    message = {
        "role": "assistant", "content": TEXT[:2], "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "reasoning": None,
    }  # fmt: skip
    head = {"id": "chatcmpl", "object": "chat.completion.chunk", "created": 0, "model": BASE}

    def choice(delta: Any, **rest: Any) -> Any:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | rest

    async with running_vllm(**DUMMY) as (_, client):
        whole = json.loads(await body_of(client, "/v1/chat/completions", **CHAT, return_token_ids=True))
        assert whole["choices"][0]["message"] == message
        assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (CHAT_PROMPT, [first, second])
        assert list(whole)[-6:] == [
            "prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics",
        ]  # fmt: skip
        stream = await body_of(client, "/v1/chat/completions", **CHAT, return_token_ids=True, stream=True)
        opening = choice({"role": "assistant", "content": ""})
        end = choice({"content": TEXT[1]}, finish_reason="length", stop_reason=None, token_ids=[second])
        assert stream == events(
            head | {"choices": [opening], "prompt_token_ids": CHAT_PROMPT, "prompt_text": None},
            head | {"choices": [choice({"content": TEXT[0]}, token_ids=[first])]},
            head | {"choices": [end], "system_fingerprint": "PRINT"},
        )
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        asked = CHAT | {"messages": parts, "add_generation_prompt": False}
        bare = json.loads(await body_of(client, "/v1/chat/completions", **asked, return_token_ids=True))
        assert bare["prompt_token_ids"] == [256, *b"user: a\nb\n"]
        assert bare["choices"][0]["message"]["role"] == "user"
        tokens = await client.http.post("/tokenize", json={"messages": CHAT["messages"]})
        assert tokens.json() == {"count": 21, "max_model_len": 1024, "tokens": CHAT_PROMPT, "token_strs": None}
        text = await client.http.post("/detokenize", json={"tokens": [256, *b"hi"]})
        assert text.text == '{"prompt":"<s>hi"}'


async def test_prompts_of_every_form() -> None:
    """Texts, ids, several of either, several answers to each: choices are numbered through, counts are summed."""
    async with running_vllm(**DUMMY) as (_, client):
        for prompt in (["hello", "bye"], [HELLO, [256, *b"bye"]]):
            answer = (await client.complete(BASE, prompt, 2, return_token_ids=True)).json()
            assert [choice["index"] for choice in answer["choices"]] == [0, 1]
            assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [HELLO, [256, *b"bye"]]
            assert answer["usage"]["prompt_tokens"] == 10
        assert await client.tokens(BASE, HELLO) == expected("", None, 4)
        several = (await client.complete(BASE, ["hello", "bye"], 2, n=2, temperature=1)).json()
        assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
        assert (several["usage"]["prompt_tokens"], several["usage"]["completion_tokens"]) == (10, 8)
        streamed = await client.completion_events(BASE, ["hello", "bye"], 3)
        assert [texts_of(streamed, index) for index in (0, 1)] == [TEXT[:3]] * 2
        cut = (await client.complete(BASE, [1] * 1020, 10)).json()
        assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (4, "length")
        assert (await client.complete(BASE, "hi", max_tokens=None)).json()["usage"]["completion_tokens"] == 16


async def test_tokens_come_together() -> None:
    """With a stream interval the first token comes alone, then several at a time; nothing is lost."""
    async with running_vllm(**DUMMY, stream_interval=3) as (_, client):
        streamed = await client.completion_events(BASE, tokens=9, return_token_ids=True)
        counts = [len(event["choices"][0]["token_ids"]) for event in streamed if event != DONE]
        assert (counts, texts_of(streamed)) == ([1, 3, 3, 2], TEXT[:9])


FORCE_EOS = {"logit_bias": {str(EOS): 100}}
STOPS = {
    "string": ({"stop": TEXT[3:5]}, TEXT[:3], 5, "stop", TEXT[3:5]),
    "first of several": ({"stop": ["zzz", TEXT[4], TEXT[3:5]]}, TEXT[:4], 5, "stop", TEXT[4]),
    "string kept": ({"stop": TEXT[3:5], "include_stop_str_in_output": True}, TEXT[:5], 5, "stop", TEXT[3:5]),
    "string too early": ({"stop": TEXT[3:5], "min_tokens": 5}, TEXT[:8], 8, "length", None),
    "string never": ({"stop": ["§§§§"]}, TEXT[:8], 8, "length", None),
    "token": ({"stop_token_ids": [ord(TEXT[2])]}, TEXT[:2], 3, "stop", ord(TEXT[2])),
    "end": (FORCE_EOS, "", 1, "stop", None),
    "end after some": (FORCE_EOS | {"min_tokens": 3}, TEXT[:3], 4, "stop", None),
    "end ignored": (FORCE_EOS | {"ignore_eos": True}, "", 8, "length", None),
}


@pytest.mark.parametrize(("fields", "text", "count", "reason", "stop"), STOPS.values(), ids=STOPS)
async def test_ends(fields: Any, text: str, count: int, reason: str, stop: str | int | None) -> None:
    """Streamed or not: the same text, all tokens counted, the reason with the last of them."""
    async with running_vllm(**DUMMY) as (_, client):
        whole = (await client.complete(BASE, tokens=8, return_token_ids=True, **fields)).json()
        choice = whole["choices"][0]
        assert (choice["text"], len(choice["token_ids"])) == (text, count)
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
        assert whole["usage"]["completion_tokens"] == count
        streamed = await client.completion_events(BASE, tokens=8, return_token_ids=True, **fields)
        *before, last = [event["choices"][0] for event in streamed if event != DONE]
        assert texts_of(streamed) == text
        assert (last["finish_reason"], last["stop_reason"]) == (reason, stop)
        assert not any(choice["finish_reason"] for choice in before)
        assert sum(len(choice["token_ids"]) for choice in (*before, last)) == count


def test_characters_appear_when_they_are_complete() -> None:
    """As vLLM's detokenizer was seen to do it, broken bytes and a stop string's held back ones included."""

    def deltas(tokens: Sequence[int], stops: Stops) -> list[str]:
        said = GeneratedText(stops)
        told = []
        for place, token in enumerate(tokens):
            ended = said.add(token)
            told.append(said.delta(ended or place == len(tokens) - 1))
            if ended:
                break
        return told

    seen = [143, 26, 236, 237, 123, 81]
    assert deltas(seen, Stops()) == ["", "\ufffd\x1a", "", "", "\ufffd\ufffd{", "Q"]
    assert deltas(seen[:4], Stops()) == ["", "\ufffd\x1a", "", ""]
    assert deltas(seen, Stops(("zzzz",))) == ["", "", "", "", "\ufffd\x1a", "\ufffd\ufffd{Q"]
    assert deltas(seen, Stops(("\ufffd{",))) == ["", "\ufffd", "", "", "\x1a\ufffd"]
    assert deltas([*"é€".encode(), 257], Stops()) == ["", "é", "", "", "€", ""]


LONG = "This model's maximum context length is 1024 tokens. However, your prompt contains "
LONG_END = " input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no prompt": ({"prompt": None}, "Either prompt or prompt_embeds must be provided and non-empty. "
                  "(parameter=prompt)", "prompt"),
    "no prompts": ({"prompt": []}, "You must pass at least one prompt", None),
    "nothing": ({"prompt": [[]]}, "The decoder prompt cannot be empty", None),
    "no such token": ({"prompt": [5000]}, "Token id 5000 is out of vocabulary", None),
    "long text": ({"prompt": "x" * 2000},
                  f"{LONG}at least 1025{LONG_END}input prompt. (parameter=input_tokens, value=1025)", "input_tokens"),
    "long ids": ({"prompt": [1] * 1100},
                 f"{LONG}1100{LONG_END}input prompt. (parameter=input_tokens, value=1100)", "input_tokens"),
    "no room": ({"prompt": [1] * 1024}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
                "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
                  "max_tokens"),
    "more than most": ({"min_tokens": 5}, "min_tokens must be less than or equal to max_tokens=2, got 5.", None),
    "temperature": ({"temperature": -1}, "temperature must be non-negative, got -1.0. (parameter=temperature, "
                    "value=-1.0)", "temperature"),
    "greedy twins": ({"n": 2}, "n must be 1 when using greedy sampling, got 2.", None),
    "empty stop": ({"stop": ""}, "stop cannot contain an empty string.", None),
    "counts of no stream": ({"stream_options": {"include_usage": True}}, "Stream options can only be defined when "
                            "`stream=True`. (parameter=stream_options)", "stream_options"),
    "bias": ({"logit_bias": {"9999": 1}}, "token_id(s) [9999] in logit_bias contain out-of-vocab token ids. "
             "Vocabulary size: 259 (parameter=logit_bias, value=[9999])", "logit_bias"),
    "echo": ({"echo": True}, "echo is not available from the emulated engine", "echo"),
    "logprobs": ({"logprobs": 1}, "logprobs is not available from the emulated engine", "logprobs"),
}  # fmt: skip
INVALID = {
    "type": ({"max_tokens": "x"}, "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': "
             "'Input should be a valid integer, unable to parse string as an integer', 'input': 'x'}",
             "body.max_tokens"),
    "union": ({"stop": 3}, "2 validation errors:\n  {'type': 'string_type', 'loc': 'body.stop', 'msg': 'Input should "
              "be a valid string', 'input': '3'}\n  {'type': 'list_type', 'loc': 'body.stop', 'msg': 'Input should be "
              "a valid list', 'input': '3'}", "body.stop"),
    "negative": ({"prompt": [-1]}, "4 validation errors:\n  {'type': 'greater_than_equal', 'loc': 'body.prompt.0', "
                 "'msg': 'Input should be greater than or equal to 0', 'input': '-1', 'ctx': {'ge': 0}}\n  {'type': "
                 "'list_type', 'loc': 'body.prompt.0', 'msg': 'Input should be a valid list', 'input': '-1'}\n  "
                 "{'type': 'string_type', 'loc': 'body.prompt', 'msg': 'Input should be a valid string', 'input': "
                 "'<list of 1 items>'}\n  {'type': 'string_type', 'loc': 'body.prompt.0', 'msg': 'Input should be a "
                 "valid string', 'input': '-1'}", "body.prompt.0"),
}  # fmt: skip
BODIES = {
    "{nope": ("1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1', 'msg': 'JSON decode error', 'input': "
              "'<dict of 0 items>', 'ctx': {'error': 'Expecting property name enclosed in double quotes'}}", "body.1"),
    "": ("1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg': 'Field required', 'input': 'None'}",
         "body"),
    "[]": ("1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid "
           "dictionary or object to extract fields from', 'input': '<list of 0 items>'}", "body"),
}  # fmt: skip


def error(text: str, kind: str, param: str | None, code: int = 400) -> str:
    return compact({"error": {"message": text, "type": kind, "param": param, "code": code}})


async def test_refusals() -> None:
    """Before anything runs, in the engine's words, and with its kinds of error."""
    json_type = {"content-type": "application/json"}
    async with running_vllm(**DUMMY) as (server, client):
        for kind, cases in (("BadRequestError", REFUSED), ("Bad Request", INVALID)):
            for name, (fields, text, param) in cases.items():
                answer = await client.http.post("/v1/completions", json=ASKED | fields)
                assert (answer.status_code, answer.text) == (400, error(text, kind, param)), name
        for body, (text, param) in BODIES.items():
            answer = await client.http.post("/v1/completions", content=body, headers=json_type)
            assert answer.text == error(text, "Bad Request", param)
        untyped = await client.http.post("/v1/load_lora_adapter", content="{}")
        assert "Unsupported Media Type: Only 'application/json' is allowed" in untyped.json()["error"]["message"]
        unknown = await client.complete("nix", stream=True)
        text = "The model `nix` does not exist. Valid aliases: base."
        assert (unknown.status_code, unknown.text) == (404, error(text, "NotFoundError", "model", 404))
        empty = await client.http.post("/v1/chat/completions", json=CHAT | {"messages": []})
        assert empty.json()["error"]["message"].startswith("Cannot apply chat template to an empty conversation.")
        assert not server.served


async def test_what_is_found_wrong_after_a_stream_began() -> None:
    """Tokens that the vocabulary has not got: the status is 200, the error an event, written with spaces."""
    async with running_vllm(**DUMMY) as (_, client):
        answer = await client.complete(BASE, [5000], stream=True)
        said = json.dumps(json.loads(error("Token id 5000 is out of vocabulary", "BadRequestError", None)))
        assert (answer.status_code, answer.text) == (200, f"data: {said}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_is_not_waited_for(streamed: bool) -> None:
    """The engine is rid of the request, and says so in its gauges, which count it as no ending."""
    async with running_vllm(**DUMMY | {"max_seq_tokens": 1_000_000, "kv_blocks": 10_000}) as (server, client):
        body = ASKED | {"max_tokens": 900_000, "stream": streamed}
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}", timeout=60) as leaving:
            if streamed:
                async with leaving.stream("POST", "/v1/completions", json=body) as answer:
                    await anext(answer.aiter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await leaving.post("/v1/completions", json=body, timeout=0.3)
        await until(lambda: bool(server.served) and not server.engine.counters.active)
        assert server.served[-1].outcome == "cancelled"
        assert await client.sample("vllm:num_requests_running") == 0
        assert set((await client.samples("vllm:request_success_total")).values()) == {0}


async def test_the_openai_library() -> None:
    """Its unmodified clients read what it sends."""
    async with running_vllm(**DUMMY, api_key="secret") as (server, client):
        address = f"http://{server.http_address}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="secret") as sdk:
            whole = await sdk.completions.create(model=BASE, prompt="hello", max_tokens=4)
            assert (whole.choices[0].text, whole.usage and whole.usage.total_tokens) == (TEXT[:4], 10)
            assert [card.id async for card in sdk.models.list()] == [BASE]
            stream = await sdk.chat.completions.create(
                model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
            )
            said = [piece.choices[0].delta.content or "" async for piece in stream]
            assert "".join(said) == TEXT[:4]
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await sdk.completions.create(model="nix", prompt="hello")
        assert (await client.complete(BASE)).text == '{"error":"Unauthorized"}'
        assert (await client.http.get("/health")).status_code == 200
