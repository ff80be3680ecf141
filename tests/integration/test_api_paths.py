"""Every path of the OpenAI API by an adapter's name: what the engine answers, and what the sidecar counts and refuses.

What is wanted is asked of the engine itself, by the name that the sidecar has given the adapter there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import openapi_spec_validator
import pytest

from sidecar.backends.openai.paths import MESSAGES, RESPONSES, ROWS
from sidecar.lab.engine.openai import VllmServer
from sidecar.shell.catalogue import Wanted
from tests.integration.test_access_matrix import access_of
from tests.integration.test_openai_triton import client_of
from tests.integration.test_usage import House
from tests.integration.test_vllm import fronted
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.odd_engine import EVENTS_HEAD, Asked, odd_engine
from tests.kit.otlp import collector
from tests.kit.peft_files import write_adapter
from tests.kit.quick_engine import chunked
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.tokens import TokenMaker
from tests.kit.vllm_emulated import running_vllm

TEXT = "def quicksort(items):"
CHAT = [{"role": "user", "content": TEXT}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    RESPONSES: {"input": TEXT, "max_output_tokens": 4},
    MESSAGES: {"messages": CHAT, "max_tokens": 4},
    "/v1/embeddings": {"input": [TEXT, "hello"]},
    "/v1/classify": {"input": TEXT},
    "/v1/pooling": {"input": TEXT},
    "/v1/score": {"queries": TEXT, "documents": ["sort", "walk"]},
    "/v1/rerank": {"query": TEXT, "documents": ["sort", "walk"]},
}
LONG: dict[str, dict[str, Any]] = {
    RESPONSES: {"max_output_tokens": 2000, "ignore_eos": True}, MESSAGES: {"max_tokens": 2000, "ignore_eos": True},
}  # fmt: skip
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    RESPONSES: "chat",
    MESSAGES: "chat",
    **{
        path: path.rpartition("/")[2]
        for path in ("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify", "/v1/pooling")
    },
}
"""By the GenAI conventions, which have no name for the last four."""
VARYING = re.compile(r'"(id|item_id)":"[^"]*"|"created(_at)?":\d+')


def test_there_is_a_body_for_each_path() -> None:
    assert BODIES.keys() == ROWS.keys()


@asynccontextmanager
async def served_by(
    folder: Path, path: str, time_scale: float = 0.0, **record: Any
) -> AsyncIterator[tuple[Serving, VllmServer]]:
    """Run an engine that has a path, and a sidecar in front of it with two adapters."""
    write_adapters(folder / "adapters", 2)
    runner = "generate" if ROWS[path].generates else "pooling"
    async with (
        running_vllm(compute="none", runner=runner, max_loras=2, max_cpu_loras=4, time_scale=time_scale) as (engine, _),
        fronted([engine], folder, **record) as served,
    ):
        yield served, engine


async def told(client: httpx.AsyncClient, path: str, model: str, **more: Any) -> str:
    """Return an answer without what is another each time."""
    reply = await client.post(
        path, json=BODIES[ROWS[path].path if path in ROWS else _of(path)] | {"model": model} | more
    )
    assert reply.status_code == httpx.codes.OK, reply.text
    return VARYING.sub("…", reply.text)


def _of(at_engine: str) -> str:
    return next(path for path, row in ROWS.items() if row.at_engine == at_engine)


@pytest.mark.parametrize("path", ROWS)
async def test_an_answer_is_the_engines_own(path: str, tmp_path: Path) -> None:
    """By name and for the base model, whole and streamed, but for the name."""
    async with (
        served_by(tmp_path, path) as (served, engine),
        client_of(served) as client,
        httpx.AsyncClient(base_url=f"http://{engine.http_address}") as direct,
    ):
        answers = set()
        for stream in (False, True) if ROWS[path].generates else (False,):
            more = {"stream": True} if stream else {}
            for name in ("a00", "a01", "base"):
                answer = await told(client, path, name, **more)
                known = {each.partition("@")[0]: each for each in engine.adapters.copies}
                wanted = await told(direct, ROWS[path].at_engine, known.get(name, name), **more)
                assert answer == wanted.replace(f'"{known.get(name, name)}"', f'"{name}"')
                answers.add(re.sub(r'"model":"\w+"', "", answer))
        assert len(answers) == (6 if ROWS[path].generates else 3), "an adapter answers as another"


@pytest.mark.parametrize("path", ROWS)
async def test_what_is_refused(path: str, tmp_path: Path) -> None:
    """An unknown name is 404 and an incomplete body 400; Anthropic's clients read their own form."""
    async with served_by(tmp_path, path) as (served, _), client_of(served) as client:
        for body, status, reason in (
            (BODIES[path] | {"model": "nobody"}, 404, "model_not_found"),
            ({"model": "a00"}, 400, "invalid_request"),
            ({"model": "a00", "stream": 1} | BODIES[path], 400, "invalid_request"),
        ):
            reply = await client.post(path, json=body)
            record = reply.json()
            assert (reply.status_code, record["error"]["reason"]) == (status, reason), record
            assert record.get("type") == ("error" if path == MESSAGES else None)


@pytest.mark.parametrize("path", [path for path in ROWS if not ROWS[path].as_text])
async def test_an_engine_without_the_path_says_so(path: str, tmp_path: Path) -> None:
    """501, by a vLLM that was started for the other paths, and by TensorRT-LLM, which has none of them."""
    other = "/v1/pooling" if ROWS[path].generates else "/v1/completions"
    async with served_by(tmp_path, other) as (served, engine), client_of(served) as client:
        reply = await client.post(path, json=BODIES[path] | {"model": "a00"})
        assert (reply.status_code, "does not have this path" in reply.text) == (501, True), reply.text
        assert not engine.adapters.copies, "it was asked all the same"
    async with (
        running_engine(compute="none") as triton,
        serving([triton], tmp_path / "adapters") as served,
        client_of(served) as client,
    ):
        reply = await client.post(path, json=BODIES[path] | {"model": "a00"})
        assert (reply.status_code, "has no such path" in reply.text) == (501, True), reply.text


async def test_a_pool_of_both_answers_on_each_path(tmp_path: Path) -> None:
    """A request goes to an engine that has its path, and the adapter with it."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running_vllm(compute="none") as (generating, _),
        running_vllm(compute="none", runner="pooling") as (pooling, _),
        fronted([generating, pooling], tmp_path) as served,
        client_of(served) as client,
    ):
        for path in ROWS:
            assert await told(client, path, "a00")
        assert (await served.ask("a00")).tokens
        assert generating.adapters.copies
        assert pooling.adapters.copies


async def test_generate_has_no_answer_where_all_engines_pool(tmp_path: Path) -> None:
    async with served_by(tmp_path, "/v1/pooling") as (served, _):
        with pytest.raises(Exception, match="no engine here answers with tokens"):
            await served.ask("a00")


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES, "/v1/embeddings"])
async def test_what_is_counted(path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Usage has the engine's own counts, whole and streamed; a pooled answer has no output tokens."""
    async with served_by(tmp_path, path) as (served, _), client_of(served) as client:
        generates = ROWS[path].generates
        for stream in (False, True) if generates else (False, False):
            await told(client, path, "a00", **({"stream": True} if stream else {}))
        command: Callable[..., Ended] = runner(capfd)
        (row,) = [row for row in await House(served, command).rows() if row["adapter"] == "a00"]
        direct = json.loads(await _whole(client, path))["usage"]
        tokens = direct["input_tokens"] if generates else direct["prompt_tokens"]
        assert (row["ok"], row["input_tokens"], row["output_tokens"]) == (2, 2 * tokens, 8 if generates else 0)


async def _whole(client: httpx.AsyncClient, path: str) -> str:
    return (await client.post(path, json=BODIES[path] | {"model": "a01"})).text


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(path: str, stream: bool, tmp_path: Path) -> None:
    async with served_by(tmp_path, path, time_scale=1.0) as (served, engine), client_of(served) as client:
        body = BODIES[path] | {"model": "a00", "stream": stream} | LONG[path]
        asking = asyncio.create_task(client.post(path, json=body))
        await until(lambda: engine.engine.counters.active == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: engine.engine.counters.active == 0 and not served.state.requests)


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_an_engine_that_dies_in_mid_stream(path: str, tmp_path: Path) -> None:
    """The stream ends with an event of its API's own form."""
    async with served_by(tmp_path, path, time_scale=1.0) as (served, engine), client_of(served) as client:
        body = BODIES[path] | {"model": "a00", "stream": True} | LONG[path]
        came = b""
        async with client.stream("POST", path, json=body) as reply:
            async for piece in reply.aiter_bytes():
                if b"delta" in piece and b"delta" not in came:
                    asyncio.get_running_loop().create_task(engine.stop())
                came += piece
        *_, last, empty = came.split(b"\n\n")
        assert empty == b""
        name, _, data = last.partition(b"\n")
        assert name == b"event: error"
        record = json.loads(data.removeprefix(b"data: "))
        assert "an answer that has begun is never repeated" in record["error"]["message"]
        assert record.get("type") == ("error" if path == MESSAGES else None)


@pytest.mark.parametrize(
    ("body", "member"),
    [
        ({"store": True}, "store"),
        ({"store": "yes"}, "store"),
        ({"background": "on"}, "background"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
    ],
)
async def test_responses_are_not_kept(body: dict[str, Any], member: str, tmp_path: Path) -> None:
    async with served_by(tmp_path, RESPONSES) as (served, _), client_of(served) as client:
        reply = await client.post(RESPONSES, json=BODIES[RESPONSES] | {"model": "a00"} | body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, member)


async def test_a_key_as_anthropics_clients_send_it(tmp_path: Path) -> None:
    key = f"lsk_000000000001_{b'acme'.hex():0<64}"
    (tmp_path / "keys.yaml").write_text(f"- {{tenant: acme, key: {key}}}\n")
    identity = {"mode": "enforce", "keys_file": str(tmp_path / "keys.yaml")}
    access = {"policies": {"ready": "open"}}
    async with (
        served_by(tmp_path, MESSAGES, identity=identity, access=access) as (served, _),
        client_of(served) as client,
    ):
        body, version = BODIES[MESSAGES] | {"model": "a00"}, {"anthropic-version": "2023-06-01"}
        for path, headers, status in (
            (MESSAGES, {"x-api-key": key} | version, 200),
            (MESSAGES, {"x-api-key": f"{key[:-1]}1"} | version, 401),
            (MESSAGES, version, 401),
            (MESSAGES, {"x-api-key": key}, 401),
        ):
            reply = await client.post(path, json=body, headers=headers)
            assert reply.status_code == status, reply.text


async def test_more_inputs_than_seats(tmp_path: Path) -> None:
    """As embedding libraries send them: the engine takes them in turn, and the request all seats meanwhile."""
    entry = {"engine": {"seats": 4, "device_pages": 2, "host_pages": 4}}
    async with served_by(tmp_path, "/v1/embeddings", backend=entry) as (served, _), client_of(served) as client:
        body = {"model": "a00", "input": [f"text {number}" for number in range(300)]}
        replies = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for _ in range(3)))
        for reply in replies:
            assert reply.status_code == httpx.codes.OK, reply.text
            assert len(reply.json()["data"]) == 300


@pytest.mark.parametrize("runner", ["generate", "pooling"])
async def test_the_description_has_what_is_served(runner: str, tmp_path: Path) -> None:
    path = RESPONSES if runner == "generate" else "/v1/pooling"
    async with served_by(tmp_path, path) as (served, _), client_of(served) as client:
        document = (await client.get("/openapi.json")).json()
        openapi_spec_validator.validate(document)
        has = {path for path in ROWS if path in document["paths"]}
        assert has == {path for path, row in ROWS.items() if row.as_text or row.generates == (runner == "generate")}


@pytest.mark.parametrize("path", ROWS)
async def test_a_limit_holds_on_each_path(path: str, tmp_path: Path) -> None:
    """The second request in a day is told to wait, in the form of its API."""
    access = {"limits": [{"adapter": "a00", "requests_per_day": 1}]}
    async with served_by(tmp_path, path, access=access) as (served, _), client_of(served) as client:
        await told(client, path, "a00")
        reply = await client.post(path, json=BODIES[path] | {"model": "a00"})
        assert (reply.status_code, reply.json()["error"]["reason"]) == (429, "rate_limited"), reply.text
        assert reply.json().get("type") == ("error" if path == MESSAGES else None)
        assert "retry-after" in reply.headers
        await told(client, path, "a01")


@pytest.mark.parametrize("path", ROWS)
async def test_each_path_is_logged(path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its id, its tenant, its adapter and its counts, as a chat is."""
    caplog.set_level(logging.INFO, "sidecar.requests")
    async with served_by(tmp_path, path) as (served, _), client_of(served) as client:
        headers = {"x-request-id": "mine", "x-lora-tenant": "acme"}
        reply = await client.post(path, json=BODIES[path] | {"model": "a00"}, headers=headers)
        assert reply.headers["x-lora-version"] == "a00@v1"
        await until(lambda: any("request ended" in line for line in caplog.messages))
    (line,) = [line for line in caplog.messages if "request ended" in line]
    wanted = (
        "id=mine",
        "tenant=acme",
        "adapter=a00",
        "outcome=ok",
        "output_tokens=4" if ROWS[path].generates else "=0",
    )
    assert all(each in line for each in wanted), line


@pytest.mark.parametrize("path", ROWS)
async def test_each_path_is_traced(path: str, tmp_path: Path) -> None:
    """The client's span is the parent, the operation has the conventions' name, and the engine gets the attempt's."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    trace, span = token_hex(16), token_hex(8)
    async with (
        collector() as received,
        served_by(tmp_path, path, otlp={"endpoint": received.grpc_url, "metrics": False, "share": 0.0}) as (served, _),
        client_of(served) as client,
    ):
        reply = await client.post(
            path, json=BODIES[path] | {"model": "a00"}, headers={"traceparent": f"00-{trace}-{span}-01"}
        )
        assert reply.status_code == httpx.codes.OK, reply.text
        (own,) = await received.have(1, f"{OPERATIONS[path]} a00")
        (attempt,) = await received.have(1, "lora.attempt")
    assert (own.trace, own.parent, own.about["lora.outcome"]) == (trace, span, "ok")
    assert own.about["gen_ai.operation.name"] == OPERATIONS[path]
    assert attempt.trace == trace


@pytest.mark.parametrize("path", ROWS)
async def test_what_is_denied_on_each_path_is_in_the_audit(path: str, tmp_path: Path) -> None:
    """An old version that only some may ask for: one line for the call, and none for the version that is current."""
    maker = TokenMaker(tmp_path)
    identity = access_of(tmp_path, maker, mode="enforce") | {
        "access": {"policies": {"ready": "roles", "roles": {"group:viewer": ["viewer"]}}},
        "data_directory": str(tmp_path / "data"),
    }
    async with served_by(tmp_path, path, **identity) as (served, _), client_of(served) as client:
        for seed in (1, 2):
            write_adapter(tmp_path / str(seed), seed=seed)
            await served.sidecar.gateway.catalogue.register("sql", str(tmp_path / str(seed)), Wanted())
        bearer = {"authorization": maker.bearer("acme")}
        statuses = [
            (await client.post(path, json=BODIES[path] | {"model": model}, headers=bearer)).status_code
            for model in ("sql", "sql@v1")
        ]
        assert statuses == [200, 404]
        assert served.sidecar.access.audit.log.flush()
        lines = [json.loads(line) for line in served.sidecar.access.audit.read(0)]
    (line,) = [line for line in lines if line["result"] == "denied"]
    assert line["resource"] == {"sort": "version", "name": "sql", "version": 1}
    assert (line["action"], line["who"]["tenant"]) == ("infer_version", "acme")


@pytest.mark.parametrize(
    ("path", "begin", "delta", "end"),
    [
        (RESPONSES, "response.created", "response.output_text.delta", "response.completed"),
        (MESSAGES, "message_start", "content_block_delta", "message_stop"),
    ],
)
async def test_an_answer_begins_once(path: str, begin: str, delta: str, end: str, tmp_path: Path) -> None:
    """An engine that is lost before the first token has told its client nothing: another one answers."""
    pieces = [chunked(f'event: {name}\ndata: {{"type":"{name}"}}\n\n'.encode()) for name in (begin, delta, end)]
    asked: list[Asked] = []

    async def answer(each: Asked) -> None:
        asked.append(each)
        each.write(EVENTS_HEAD, pieces[0])
        if len(asked) == 1:
            await asyncio.sleep(0.05)
            each.transport.abort()
        else:
            each.write(*pieces[1:], chunked(b""))

    (tmp_path / "adapters").mkdir()
    async with odd_engine() as first, odd_engine() as second, fronted([first, second], tmp_path) as served:
        first.answer = second.answer = answer
        async with client_of(served) as client:
            reply = await client.post(path, json=BODIES[path] | {"model": "base", "stream": True})
    assert re.findall(r"event: (\S+)", reply.text) == [begin, delta, end]
    assert len(asked) == 2
