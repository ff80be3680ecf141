"""What vLLM answers, on vLLM itself and on the emulator's face: codes, types and texts of adapters' calls, bodies, events."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.vllm.direct import complete, completion, forget_all, http_client, load, metrics, registered, unload
from tests.e2e.vllm.faces import EMULATOR, VLLM, Face, events_of, pattern_of, remove, replaced
from tests.e2e.vllm.toy import DIMS, SIZE
from tests.peft_files import TINY
from tests.vllm_emulated import VllmProcess

INVALID, MISSING, FAILED = (400, "InvalidUserInput"), (404, "NotFoundError"), (500, "InternalServerError")
BAD_REQUEST, UNFIT = (400, "Bad Request"), (400, "BadRequestError")
CONTEXT = 1024
OPTIONS = (
    "--max-loras=2",
    "--max-cpu-loras=4",
    "--max-lora-rank=16",
    "--max-num-seqs=64",
    f"--max-model-len={CONTEXT}",
)


@pytest.fixture(scope="module", params=[VLLM, EMULATOR])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def emulated() -> Iterator[VllmProcess]:

    with asyncio.Runner() as runner:
        process = VllmProcess(*OPTIONS, "--compute", "llama")
        runner.run(process.start())
        yield process
        runner.run(process.kill())


@pytest.fixture
def face(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Face:
    """A server with nothing registered."""
    if kind == VLLM:
        return Face(VLLM, request.getfixturevalue("server").http_address, DIMS, tmp_path, SIZE)
    address = request.getfixturevalue("emulated").http_address
    asyncio.run(forget_all(address))
    return Face(EMULATOR, address, TINY, tmp_path, 0.5)


@pytest_asyncio.fixture
async def client(face: Face) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(face.address) as client:
        yield client


def error(kind: tuple[int, str], message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind[1], "param": param, "code": kind[0]}}


def assert_error(reply: httpx.Response, kind: tuple[int, str], message: str, param: str | None = None) -> None:
    assert (reply.status_code, reply.json()) == (kind[0], error(kind, message, param))
    assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
    assert reply.headers["content-type"] == "application/json"


async def test_load_and_unload(face: Face, client: httpx.AsyncClient) -> None:
    """Success is plain text; a name is loaded once, and unloaded once."""
    path = face.adapter()
    told = await load(client, "sql", path)
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert "content-type" not in told.headers
    again = "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
    assert_error(await load(client, "sql", path), INVALID, again)
    assert (await load(client, "sql", path, load_inplace=True)).status_code == 200
    assert (await load(client, "twin", path, of_no_meaning=1)).status_code == 200
    told = await unload(client, "sql")
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert_error(await unload(client, "sql"), MISSING, "The lora adapter 'sql' cannot be found.")


async def test_calls_that_say_too_little(face: Face, client: httpx.AsyncClient) -> None:
    """What is missing is named; an empty name or path is another error; the base model's name is taken."""
    path = face.adapter()
    missing = "{'type': 'missing', 'loc': 'body.%s', 'msg': 'Field required', 'input': '<dict of %d items>'}"
    for body, names in (({"lora_path": "x"}, ["lora_name"]), ({}, ["lora_name", "lora_path"])):
        reply = await client.post("/v1/load_lora_adapter", json=body)
        lines = [missing % (name, len(body)) for name in names]
        counted = f"{len(names)} validation error{'s' if len(names) > 1 else ''}:"
        assert_error(reply, BAD_REQUEST, "\n  ".join([counted, *lines]), "body.lora_name")
    headers = {"content-type": "application/json"}
    reply = await client.post("/v1/load_lora_adapter", content='{"lora_name": ', headers=headers)
    text = "{'type': 'json_invalid', 'loc': 'body.14', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}"
    assert_error(reply, BAD_REQUEST, f"1 validation error:\n  {text}", "body.14")
    reply = await client.post("/v1/load_lora_adapter", content='{"lora_name": "a", "lora_path": "b"}')
    assert_error(
        reply, BAD_REQUEST, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    )
    both = "Both 'lora_name' and 'lora_path' must be provided."
    assert_error(await load(client, "", path), INVALID, both)
    assert_error(await load(client, "x", ""), INVALID, both)
    assert_error(
        await load(client, "base", path), INVALID, "The lora adapter 'base' conflicts with a served base model."
    )
    assert_error(await unload(client, ""), INVALID, "'lora_name' needs to be provided to unload a LoRA adapter.")
    reply = await client.post("/v1/unload_lora_adapter", json={})
    assert_error(reply, BAD_REQUEST, f"1 validation error:\n  {missing % ('lora_name', 0)}", "body.lora_name")


async def test_no_adapter_at_the_path(face: Face, client: httpx.AsyncClient, tmp_path: Path) -> None:
    """A path below the usual top folders is not repeated."""
    (tmp_path / "empty").mkdir()
    for path, told in ((tmp_path / "empty", "<path>"), (tmp_path / "none", "<path>"), ("/nowhere/at/all", "/nowhere/at/all"),
                       ("some/thing", "some/thing")):  # fmt: skip
        assert_error(await load(client, "x", path), MISSING, f"Loading lora x failed: No adapter found for {told}")


WEIGHTS = "adapter_model.safetensors"
REFUSED: list[tuple[Callable[[Face], Path], str]] = [
    (lambda face: face.adapter(rank=64), "LoRA rank 64 is greater than max_lora_rank 16."),
    (lambda face: face.adapter(use_dora=True), "vLLM does not yet support DoRA."),
    (lambda face: face.adapter(bias="all"), "Adapter bias is not supported."),
    (lambda face: face.adapter(lora_bias=True), "vLLM does not support LoRA bias (lora_bias)."),
    (
        lambda face: face.adapter(modules_to_save=["lm_head"]),
        'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification models. '
        "Unsupported modules_to_save: ['lm_head']",
    ),
    (lambda face: face.damaged(lambda path: (path / WEIGHTS).unlink()), "<path> doesn't contain tensors"),
    (
        lambda face: face.damaged(replaced(WEIGHTS, b"x" * 100)),
        "Error while deserializing header: header too large",
    ),
    (
        lambda face: face.damaged(lambda path: replaced(WEIGHTS, (path / WEIGHTS).read_bytes()[:1000])(path)),
        "Error while deserializing header: invalid header length",
    ),
    (
        lambda face: face.damaged(replaced("adapter_config.json", b"{")),
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
]


@pytest.mark.parametrize(("made", "cause"), REFUSED, ids=[cause[:24] for _, cause in REFUSED])
async def test_what_the_worker_refuses(
    face: Face, client: httpx.AsyncClient, made: Callable[[Face], Path], cause: str
) -> None:
    """A bad adapter is a 500 of a healthy engine, which answers on."""
    assert (await load(client, "good", face.adapter())).status_code == 200
    text = f"Call to add_lora method failed: Worker failed with error '{cause}', please check the stack trace above for the root cause"
    assert_error(await load(client, "bad", made(face)), FAILED, text)
    assert (await client.get("/health")).status_code == 200
    assert await registered(client) == {"good": str(face.folder / "made-1")}
    assert len(await complete(client, "good", [3, 4, 5], 2)) == 2


async def test_a_lying_config_is_trusted(face: Face, client: httpx.AsyncClient) -> None:
    """Tensors of rank 16 under `r: 8` load, and answer with another scale."""
    honest, lying = face.adapter(seed=1, rank=16), face.adapter(seed=1, rank=16, r=8)
    for name, path in (("honest", honest), ("lying", lying)):
        assert (await load(client, name, path)).status_code == 200
    asked = [3, 4, 5]
    assert await complete(client, "honest", asked, 12) != await complete(client, "lying", asked, 12)


async def test_models(face: Face, client: httpx.AsyncClient) -> None:
    """Registered, not resident: the base model first, and adapters with their folder and parent."""
    paths = [face.adapter(seed) for seed in range(6)]
    for number, path in enumerate(paths):
        assert (await load(client, f"m{number}", path)).status_code == 200
    reply = await client.get("/v1/models")
    base, *adapters = reply.json()["data"]
    permission = [
        {
            "id": "…", "object": "model_permission", "created": "…", "allow_create_engine": False, "allow_sampling": True,
            "allow_logprobs": True, "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
            "organization": "*", "group": None, "is_blocking": False,
        }
    ]  # fmt: skip
    assert (base["id"], base["parent"], base["max_model_len"]) == ("base", None, CONTEXT)
    expected = [
        {
            "id": f"m{number}", "object": "model", "created": "…", "owned_by": "vllm", "root": str(path), "parent": "base",
            "max_model_len": None, "permission": permission,
        }
        for number, path in enumerate(paths)
    ]  # fmt: skip
    assert [pattern_of(_json(one)) for one in adapters] == [_json(one) for one in expected]
    assert (await client.get("/v1/models/m1")).json() == {"detail": "Not Found"}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


CHOICE = '{"index":0,"text":"…","logprobs":null,"finish_reason":%s,"stop_reason":null,'
WHOLE = (
    '{"id":"…","object":"text_completion","created":"…","model":"sql","choices":['
    + CHOICE % '"length"'
    + '"token_ids":%s,"prompt_logprobs":null,"prompt_token_ids":%s,"routed_experts":null}],"service_tier":null,'
    '"system_fingerprint":"…","usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,'
    '"prompt_tokens_details":null,"completion_tokens_details":null},"kv_transfer_params":null,'
    '"ec_transfer_params":null,"metrics":null}'
)
CHUNK = (
    '{"id":"…","object":"text_completion","created":"…","model":"sql","choices":['
    + CHOICE
    + '"prompt_token_ids":%s,"token_ids":%s}]'
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

    assert pattern_of(await told()) == WHOLE % (_json(tokens), _json(PROMPT))
    assert pattern_of(await told(return_token_ids=False)) == WHOLE % ("null", "null")
    *chunks, done = events_of(await told(stream=True, return_token_ids=False))
    assert done == "[DONE]"
    last = CHUNK % ('"length"', "null", "null") + ',"system_fingerprint":"…"}'
    assert_chunks(chunks, CHUNK % ("null", "null", "null") + "}", last)
    *chunks, usage, done = events_of(await told(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [token for choice in choices for token in choice["token_ids"]] == tokens
    assert [choice["prompt_token_ids"] for choice in choices] == [PROMPT] + [None] * (len(choices) - 1)
    shown = [re.sub(r'_ids":(null|\[[\d,]+\])', r'_ids":"…"', pattern_of(chunk)) for chunk in chunks]
    assert_patterns(shown, CHUNK % ("null", '"…"', '"…"') + "}", CHUNK % ('"length"', '"…"', '"…"') + "}")
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
    '"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,'
    '"system_fingerprint":"…","usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":3,'
    '"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,'
    '"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
)
CHAT_CHUNK = '{"id":"…","object":"chat.completion.chunk","created":"…","model":"sql","choices":[{"index":0,"delta":'
FIRST_DELTA = '{"role":"assistant","content":"…"},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}'


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
    going = CHAT_CHUNK + '{"content":"…"},"logprobs":null,"finish_reason":null,"token_ids":null}]}'
    last = (
        CHAT_CHUNK + '{"content":"…"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}'
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
            "This model's maximum context length is 1024 tokens. However, your prompt contains 1200 input tokens, which "
            "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
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
    assert (await client.get("/version")).json() == {"version": "0.32.0"}
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


# What it does.


async def test_unload_under_way(face: Face, client: httpx.AsyncClient) -> None:
    """It forgets the name, at once; what runs goes on to its end, and the next request is unknown."""
    await load(client, "sql", face.adapter())
    whole = await complete(client, "sql", PROMPT, 200)
    running = asyncio.create_task(complete(client, "sql", PROMPT, 200))
    await has_running(client)
    assert (await unload(client, "sql")).status_code == 200
    assert not running.done()
    assert (await client.post("/v1/completions", json=completion("sql", PROMPT, 1))).status_code == 404
    assert await running == whole


async def test_a_client_that_leaves(face: Face, client: httpx.AsyncClient) -> None:
    """Its request ends with it."""
    await load(client, "sql", face.adapter())
    async with client.stream("POST", "/v1/completions", json=completion("sql", PROMPT, 1000, stream=True)) as reply:
        await anext(reply.aiter_raw())
    async with asyncio.timeout(60):
        while (await metrics(client)).running:
            await asyncio.sleep(0.01)
    assert (await client.get("/health")).status_code == 200


async def test_changed_files_under_a_name_and_path_that_were_seen(face: Face, client: httpx.AsyncClient) -> None:
    """Whoever asks again what was asked before the change gets an answer of neither; a new prompt is answered rightly."""
    path = face.adapter(seed=1)
    seen, new = [5 + n % 200 for n in range(300)], [7 + n % 150 for n in range(300)]
    await load(client, "sql", path)
    old = await complete(client, "sql", seen, 8)
    renewed = face.adapter(seed=2)
    await load(client, "fresh", renewed)
    right = {tuple(asked): await complete(client, "fresh", asked, 8) for asked in (seen, new)}
    remove(path)
    renewed.rename(path)
    await unload(client, "sql")
    assert (await load(client, "sql", path)).status_code == 200
    assert await complete(client, "sql", seen, 8) not in (old, right[tuple(seen)])
    assert await complete(client, "sql", new, 8) == right[tuple(new)]


async def has_running(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while not (await metrics(client)).running:
            await asyncio.sleep(0.005)
