"""The OpenAI API in front of engines that take text only: emulated Tritons with TensorRT-LLM's models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
from tritonclient.grpc import InferResult, service_pb2_grpc

from sidecar.core.events import FirstToken
from sidecar.lab.engine.kserve import models
from tests.integration.test_prompt_counts import write_tokenizer
from tests.kit.emulated import (
    EngineProcess,
    add_tensor,
    clients_asked,
    read_served,
    running_engine,
    stream_answers,
    text_request,
)
from tests.kit.openai_house import JSON
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import Serving, serving, until, write_adapters

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DUMMY = {"compute": "none", "shape": "tiny"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ESTIMATED = {"prompt_tokens": 1, "prompt_tokens_estimated": True}
"""The prompt "hi" where nothing counts it: OpenAI's rule of thumb has four characters to a token."""
USER = [{"role": "user", "content": "hi"}]


def text_of(served: Serving, name: str, tokens: int) -> str:
    """Return what the emulated engine answers."""
    return bytes(served.expected(name, tokens)).decode()


@asynccontextmanager
async def client_of(served: Serving) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://{served.sidecar.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, headers=JSON) as client:
        yield client


@asynccontextmanager
async def in_front(
    tmp_path: Path, template: str = "", base_model: dict[str, Any] | None = None, /, **options: Any
) -> AsyncIterator[tuple[Any, ...]]:
    """Serve two adapters from an emulated engine; `template` is a chat template, `base_model` more of that section.

    `identity` is configuration, the other options are the engine's.
    """
    record = {"identity": options.pop("identity")} if "identity" in options else {}
    names = write_adapters(tmp_path / "adapters", 2)
    base: dict[str, Any] = {"name": BASE_MODEL, "aliases": ["other-name"]} | (base_model or {})
    if template:
        (tmp_path / "template").mkdir()
        (tmp_path / "template" / "chat_template.jinja").write_text(template)
        (tmp_path / "template" / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
        base["chat_template"] = str(tmp_path / "template")
    async with (
        running_engine(**(DUMMY | options)) as engine,
        serving([engine], tmp_path / "adapters", backend={"base_model": base}, **record) as served,
        client_of(served) as client,
    ):
        assert names == ["a00", "a01"]
        yield served, engine, client


def events_of(text: str) -> list[dict[str, Any]]:
    """Return a stream's events; the last must say that it is complete."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("separate_final", [False, True])
async def test_a_completion(tmp_path: Path, separate_final: bool) -> None:
    """As one object, with the tokens that it took; of the prompt's it says that they are an estimate."""
    async with in_front(tmp_path, separate_final=separate_final) as (served, _, client):
        for name in ("a00", "a01@v1", "base", BASE_MODEL, "other-name"):
            response = await client.post(COMPLETIONS, json={"model": name, "prompt": "hi", "max_tokens": 5})
            record = response.json()
            adapter = name.partition("@")[0] if name.startswith("a0") else ""
            assert record["choices"] == [
                {"index": 0, "text": text_of(served, adapter, 5), "logprobs": None, "finish_reason": "length"}
            ]
            assert (record["object"], record["model"]) == ("text_completion", name)
            assert record["usage"] == ESTIMATED | {"completion_tokens": 5, "total_tokens": 6}
            assert response.headers.get("x-lora-version", "") == (f"{adapter}@v1" if adapter else "")
            assert response.headers["x-lora-backend"] == "trt-0"


async def test_a_streamed_completion(tmp_path: Path) -> None:
    """A chunk for each token, the reason of the end, the usage where it was asked for."""
    async with in_front(tmp_path) as (served, _, client):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4, "stream": True}
        chunks = events_of((await client.post(COMPLETIONS, json=body)).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(served, "a00", 4)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert not any("usage" in chunk for chunk in chunks)
        body["stream_options"] = {"include_usage": True}
        *chunks, last = events_of((await client.post(COMPLETIONS, json=body)).text)
        assert all(chunk["usage"] is None for chunk in chunks)
        assert (last["choices"], last["usage"]) == ([], ESTIMATED | {"completion_tokens": 4, "total_tokens": 5})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat(tmp_path: Path, stream: bool) -> None:
    """As chunks or as one object."""
    async with in_front(tmp_path, TEMPLATE) as (served, _, client):
        body = {"model": "a01", "messages": USER, "max_completion_tokens": 3, "stream": stream}
        response = await client.post(CHAT, json=body)
        expected = text_of(served, "a01", 3)
        if stream:
            chunks = [chunk["choices"][0] for chunk in events_of(response.text)]
            assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected
            assert (chunks[-1]["delta"], chunks[-1]["finish_reason"]) == ({}, "length")
        else:
            record = response.json()
            assert record["object"] == "chat.completion"
            assert record["choices"][0]["message"] == {"role": "assistant", "content": expected}


async def test_what_a_chat_is_to_the_engine(tmp_path: Path) -> None:
    """The text that its model's template makes of it."""
    async with in_front(tmp_path, TEMPLATE, compute="llama") as (_, _, client):
        content = [{"type": "text", "text": "yes"}]
        messages = [*USER, {"role": "assistant", "content": content}]
        chat = await client.post(CHAT, json={"model": "a01", "messages": messages, "max_tokens": 12})
        texts = []
        for prompt in ("<user>hi<assistant>yes<assistant>", "<user>hi<assistant>yes"):
            body = {"model": "a01", "prompt": prompt, "max_tokens": 12}
            texts.append((await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"])
        assert texts[0] != texts[1]
        assert chat.json()["choices"][0]["message"]["content"] == texts[0]


async def test_a_tokenizer_counts_prompts(tmp_path: Path) -> None:
    """Of completions and of chats, as the engine gets them; streamed and whole, and for each prompt of a list."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")  # one token for each word, and one that begins a text
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    async with in_front(tmp_path, template, {"tokenizer": str(tokenizer)}) as (_, _, client):
        for stream in (False, True):
            more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            for path, asked, tokens in (
                (COMPLETIONS, {"prompt": "one two three"}, 4),
                (COMPLETIONS, {"prompt": ["one", "one two"]}, 5),
                (COMPLETIONS, {"prompt": "one two three", "n": 2}, 4),
                (CHAT, {"messages": USER}, 3),
            ):
                response = await client.post(path, json={"model": "a00", "max_tokens": 2, **asked, **more})
                usage = (events_of(response.text)[-1] if stream else response.json())["usage"]
                answers = 2 if asked.get("n") or isinstance(asked.get("prompt"), list) else 1
                assert usage == {
                    "prompt_tokens": tokens, "completion_tokens": 2 * answers, "total_tokens": tokens + 2 * answers,
                }, asked  # fmt: skip


async def test_two_templates(tmp_path: Path) -> None:
    """A chat goes to engines that would make the same of it, and not to one that has no template."""
    write_adapters(tmp_path / "adapters", 1)
    backends = []
    async with running_engine(**DUMMY) as one, running_engine(**DUMMY) as two, running_engine(**DUMMY) as three:
        for number, engine in enumerate((one, two, three)):
            (tmp_path / f"{number}.jinja").write_text(f"{number}{TEMPLATE}")
            base = {"name": BASE_MODEL} | ({"chat_template": str(tmp_path / f"{number}.jinja")} if number else {})
            backends.append({"url": f"triton://{engine.grpc_address}", "id": f"t{number}", "base_model": base})
        async with serving([], tmp_path / "adapters", backends=backends) as served, client_of(served) as client:
            for _ in range(6):
                response = await client.post(CHAT, json={"model": "a00", "messages": USER, "max_tokens": 2})
                assert response.headers["x-lora-backend"] == "t1"
            refused = await client.post(CHAT, json={"model": "a00", "messages": [{"role": "user", "content": 7}]})
            assert refused.status_code == 400


async def test_a_chat_without_a_template(tmp_path: Path) -> None:
    """400, with what to configure."""
    async with in_front(tmp_path) as (_, engine, client):
        response = await client.post(CHAT, json={"model": "a00", "messages": USER})
        assert response.status_code == 400
        assert "set backends[].base_model.chat_template" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "messages"
        assert not clients_asked(engine)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 1025}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": "1"}, "min_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"n": 0}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"guided_json": {}}, "guided_json"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": [1]}, "stop"),
    ],
)
async def test_what_such_engines_cannot_do(tmp_path: Path, more: dict[str, Any], param: str) -> None:
    """Refused by name: an answer without it would not be the one that was asked for."""
    async with in_front(tmp_path) as (_, engine, client):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4} | more
        response = await client.post(COMPLETIONS, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["reason"]) == (400, param, "invalid_request")
        assert not clients_asked(engine)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_to_a_prompt(tmp_path: Path, path: str, stream: bool) -> None:
    """Each is a request of its own at the engine, and a choice of one answer; the prompt counts once, as in vLLM."""
    async with in_front(tmp_path, TEMPLATE) as (served, engine, client):
        asked = {"messages": USER} if path == CHAT else {"prompt": ["hi", "you"]}
        body = {"model": "a00", "max_tokens": 3, "n": 3, "temperature": 1, "seed": 7, "stream": stream} | asked
        response = await client.post(path, json=body | ({"stream_options": {"include_usage": True}} if stream else {}))
        records = events_of(response.text) if stream else [response.json()]
        texts: dict[int, str] = {}
        for choice in (choice for record in records for choice in record["choices"]):
            piece = choice.get("delta", choice.get("message", choice))
            texts[choice["index"]] = texts.get(choice["index"], "") + (piece.get("content") or piece.get("text") or "")
        count = 3 if path == CHAT else 6
        assert texts == dict.fromkeys(range(count), text_of(served, "a00", 3))
        usage = records[-1]["usage"]
        prompts = len(b"<user>hi<assistant>") // 4 + 1 if path == CHAT else 2
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompts, 3 * count)
        assert usage["prompt_tokens_estimated"] is True
        assert len([one for one in clients_asked(engine) if not one.weights]) == count


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_probability_of_each_token(tmp_path: Path, path: str) -> None:
    """As the engine tells it to a client of its own, in OpenAI's forms, whole and streamed; none behind a stop word."""
    async with (
        in_front(tmp_path, "{{ messages[0].content }}", compute="llama") as (_, engine, client),
        grpc.aio.insecure_channel(engine.grpc_address) as channel,
    ):
        request = text_request("hi", 8, streaming=True)
        add_tensor(request, "return_log_probs", "BOOL", np.array([[True]]))
        direct = await stream_answers(service_pb2_grpc.GRPCInferenceServiceStub(channel), request)
        told = [InferResult(message.infer_response) for message in direct if message.infer_response.outputs]
        values = [float(one.as_numpy("output_log_probs").ravel()[0]) for one in told]
        words = [one.as_numpy("text_output").ravel()[0].decode() for one in told]
        assert len(words) == 8
        body = {"model": "base", "max_tokens": 8, "logprobs": True if path == CHAT else 0}
        body |= {"messages": USER} if path == CHAT else {"prompt": "hi"}
        for stop in (None, "".join(words)[3:5]):
            count = 8 if stop is None else "".join(words).index(stop)
            whole = (await client.post(path, json=body | {"stop": stop})).json()["choices"][0]["logprobs"]
            answer = await client.post(path, json=body | {"stop": stop, "stream": True})
            parts = [chunk["choices"][0]["logprobs"] for chunk in events_of(answer.text) if chunk["choices"]]
            streamed = [part for part in parts if part is not None]
            if path == CHAT:
                tokens = whole["content"]
                assert [each for part in streamed for each in part["content"]] == tokens
                assert [each["logprob"] for each in tokens] == values[:count]
                assert b"".join(bytes(each["bytes"]) for each in tokens).decode() == "".join(words)[:count]
            else:
                for name in ("tokens", "token_logprobs", "text_offset"):
                    assert [each for part in streamed for each in part[name]] == whole[name]
                assert (whole["tokens"], whole["token_logprobs"]) == (words[:count], values[:count])
                assert whole["text_offset"] == list(range(count))


async def test_a_shortest_length(tmp_path: Path) -> None:
    """The engine has an input for it."""
    async with in_front(tmp_path) as (served, _, client):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 6, "min_tokens": 6, "ignore_eos": True}
        response = await client.post(COMPLETIONS, json=body)
        assert response.json()["choices"][0]["text"] == text_of(served, "a00", 6)


async def test_tools_are_refused(tmp_path: Path) -> None:
    async with in_front(tmp_path, TEMPLATE) as (_, _, client):
        body = {"model": "a00", "messages": USER, "tools": [{"type": "function"}]}
        response = await client.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    """Members with the values that they have anyway, and those about the caller."""
    async with in_front(tmp_path) as (served, _, client):
        more = {
            "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "user": "me", "logit_bias": {},
            "temperature": 0.7, "top_p": 0.9, "top_k": -1, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0,
            "repetition_penalty": 1.1, "response_format": {"type": "text"}, "metadata": {"a": "b"}, "ignore_eos": True,
        }  # fmt: skip
        response = await client.post(COMPLETIONS, json={"model": "a00", "prompt": ["hi"], "max_tokens": 4} | more)
        assert response.json()["choices"][0]["text"] == text_of(served, "a00", 4)


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_words(tmp_path: Path, stream: bool) -> None:
    """The answer ends before the first one, also where the engine goes on: then what it does is cancelled."""
    async with in_front(tmp_path) as (served, engine, client):
        whole = text_of(served, "a00", 400)
        word = whole[3:5]
        body = {"model": "a00", "prompt": "hi", "max_tokens": 400, "stop": ["no such", word], "stream": stream}
        response = await client.post(COMPLETIONS, json=body)
        if stream:
            chunks = [chunk["choices"][0] for chunk in events_of(response.text)]
            told, reason = "".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            told, reason = choice["text"], choice["finish_reason"]
        assert (told, reason) == (whole[: whole.index(word)], "stop")
        await until(lambda: not served.state.requests and not served.sidecar.gateway.tickets)
        assert clients_asked(engine)


@pytest.mark.parametrize("counts", [True, False])
async def test_an_engine_that_is_not_decoupled(counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers at once: that is told as a stream, too. Before 0.20 a count is an estimate and says so."""
    if not counts:
        monkeypatch.setattr(models, "_RETURN_FLAGS", models._RETURN_FLAGS[:4])
    async with in_front(tmp_path, decoupled=False) as (served, _, client):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4}
        record = (await client.post(COMPLETIONS, json=body)).json()
        assert record["choices"][0]["text"] == text_of(served, "a00", 4)
        usage = record["usage"]
        if counts:
            assert usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        else:
            assert (usage["prompt_tokens_estimated"], usage["completion_tokens_estimated"]) == (True, True)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        chunks = events_of((await client.post(COMPLETIONS, json=body | {"stream": True})).text)
        assert chunks[0]["choices"][0]["text"] == text_of(served, "a00", 4)


async def test_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    """The engine's own words, with the status and the code that clients know."""
    async with in_front(tmp_path, max_input_tokens=100) as (_, _, client):
        for stream in (False, True):
            body = {"model": "a00", "prompt": "x" * 200, "stream": stream}
            response = await client.post(COMPLETIONS, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["reason"]) == (400, "context_length_exceeded")
            assert "exceeds maximum input length" in error["message"]
            assert "request id" not in error["message"]


def first_tokens(served: Serving) -> int:
    """Return how many requests have begun to be answered: until then an engine may not know of one."""
    return sum(isinstance(event, FirstToken) for event in served.recorder.events)


async def test_a_client_that_leaves_a_triton(tmp_path: Path) -> None:
    """The engine's seat is free at once, whether the client had asked for a stream or not."""
    log = tmp_path / "served.jsonl"
    names = write_adapters(tmp_path / "adapters", 1)
    arguments = ("--compute", "none", "--served-log", str(log))
    async with (
        EngineProcess(*arguments, time_scale=1.0) as engine,
        serving([engine], tmp_path / "adapters") as served,
        client_of(served) as client,
    ):
        for count, stream in enumerate((False, True), start=1):
            body = {"model": names[0], "prompt": "hi", "max_tokens": 4000, "stream": stream}
            asking = asyncio.create_task(client.post(COMPLETIONS, json=body))
            await until(lambda count=count: first_tokens(served) == count)
            asking.cancel()
            await until(lambda: not served.state.requests)
        await until(lambda: len(read_served(log)) >= 3)
        outcomes = [one["outcome"] for one in read_served(log)]
        assert outcomes.count("cancelled") == 2


async def test_the_llm_api_model(tmp_path: Path) -> None:
    """It repeats the text so far in every response; a client is told each part once."""
    write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "shared").mkdir()
    backend = {"adapters_dir": str(tmp_path / "shared")}
    async with (
        running_engine(**DUMMY, protocol="llmapi") as engine,
        serving([engine], tmp_path / "adapters", backend=backend) as served,
        client_of(served) as client,
    ):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 5}
        whole = (await client.post(COMPLETIONS, json=body)).json()
        chunks = events_of((await client.post(COMPLETIONS, json=body | {"stream": True})).text)
        text = whole["choices"][0]["text"]
        assert len(text) == 5
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert whole["usage"] == ESTIMATED | {"completion_tokens": 5, "total_tokens": 6}
        refused = await client.post(COMPLETIONS, json=body | {"repetition_penalty": 1.5})
        assert refused.status_code == 400
        assert "no repetition_penalty" in refused.json()["error"]["message"]


async def test_a_backend_that_is_lost(tmp_path: Path) -> None:
    """In the middle of an answer: the stream says so as its last event, and nothing is sent twice."""
    write_adapters(tmp_path / "adapters", 1)
    arguments = ("--compute", "none")
    async with (
        EngineProcess(*arguments, time_scale=1.0) as engine,
        serving([engine], tmp_path / "adapters") as served,
        client_of(served) as client,
    ):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4000, "stream": True}
        async with client.stream("POST", COMPLETIONS, json=body) as response:
            text = ""
            async for piece in response.aiter_text():
                if not text:
                    await engine.kill()
                text += piece
        *_, last, rest = text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (rest, error["reason"], error["type"]) == ("", "backend_failed", "server_error")


async def test_models(tmp_path: Path) -> None:
    """The base model and the adapters with it as their parent; versions where they are asked for, or named."""
    async with in_front(tmp_path) as (_, _, client):
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        found = [(one["id"], one["parent"], one["root"]) for one in listed["data"]]
        assert found == [
            (BASE_MODEL, None, BASE_MODEL),
            ("a00", BASE_MODEL, "a00@v1"),
            ("a01", BASE_MODEL, "a01@v1"),
        ]
        assert all(one["created"] > 1_600_000_000 and one["object"] == "model" for one in listed["data"])
        every = (await client.get("/v1/models?versions=true")).json()["data"]
        assert [one["id"] for one in every] == [BASE_MODEL, "a00", "a00@v1", "a01", "a01@v1"]
        for name in ("a00", "a00@v1", BASE_MODEL, "other-name", "base"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
        for name in ("a07", "a00@v2", "a00@abcdefgh"):
            response = await client.get(f"/v1/models/{name}")
            assert (response.status_code, response.json()["error"]["reason"]) == (404, "model_not_found"), name


@pytest.mark.parametrize("more", [{}, {"identity": {"mode": "enforce", "keys_file": ""}}])
async def test_the_description(tmp_path: Path, more: dict[str, Any]) -> None:
    """It is OpenAPI, every path in it is served, and answers have the described form."""
    if more:
        (tmp_path / "keys.yaml").write_text("[]\n")
        more["identity"]["keys_file"] = str(tmp_path / "keys.yaml")
    async with in_front(tmp_path, TEMPLATE, {}, **more) as (_, _, client):
        document = (await client.get("/openapi.json")).json()
        openapi_spec_validator.validate(document)
        (klass,) = (each for each in document["paths"][CHAT]["post"]["parameters"] if each["name"] == "x-lora-class")
        assert ("enum" in klass["schema"]) is not bool(more)  # classes are not for everybody where identity is enforced
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                asked = operation.get("requestBody")
                body = {"json": {"model": "a00", "max_tokens": 2}} if asked else {}
                if asked:
                    body["json"] |= {"messages": USER} if path == CHAT else {"prompt": "hi"}
                answer = await client.request(method, path.replace("{model}", "a00"), **body)
                if more and "security" in operation:
                    assert answer.status_code == 401, path
                else:
                    assert answer.status_code == 200, path
                described = operation["responses"]["200" if answer.is_success else "default"].get("content")
                if described is None:
                    assert answer.content == b""
                    continue
                schema = described[answer.headers["content-type"]]["schema"] | {"components": document["components"]}
                jsonschema.validate(answer.json(), schema)
