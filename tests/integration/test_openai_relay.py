"""Completions and chats passed on to engines with that API: bytes, headers, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.backends.api import HttpRejection
from sidecar.core.enums import Fault
from sidecar.core.events import Received
from tests.kit.openai_house import DONE, House, ScriptedVllm, event, house
from tests.kit.scripted_backend import ScriptedBackend
from tests.kit.serving import Recorder, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"prompt": "hi", "max_tokens": 4}


def ask(served: House, body: Any = None, path: str = COMPLETIONS, **more: Any) -> asyncio.Task[httpx.Response]:
    """Send a request without waiting for its answer."""
    content = body if isinstance(body, bytes) else json.dumps({"model": "base", **PROMPT} | (body or {})).encode()
    return asyncio.create_task(served.client.post(path, content=content, **more))


async def test_the_body_goes_on_as_bytes_around_the_name(tmp_path: Path) -> None:
    """Nothing else of it is touched, whatever it holds; the name may be written with escapes."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        await served.register("sql")
        before = b'{ "x":{"model":"no"} ,\n"prompt":"a\\u00e9 \xc3\xa9 \\"model\\": 1e400",  "m\\u006fdel" :'
        after = b',"weird":[1.50,{"model":null}] , "max_tokens":  4 }\n'
        asking = ask(served, before + b' "s\\u0071l"' + after)
        await engine.running_are(1)
        answer = b'{"model":"sql","choices":[],"usage":{"completion_tokens":1}}'
        engine.deliver(answer, final=True)
        response = await asking
        assert (response.status_code, response.content) == (200, answer)
        assert response.headers["content-type"] == "application/json"
        (form,) = engine.forms
        assert (form.path, form.before, form.after) == (COMPLETIONS, before + b" ", after)
        assert (form.model, form.streams) == ("sql", False)


async def test_where_an_answer_came_from_stands_in_its_headers(tmp_path: Path) -> None:
    """Before its body, with the client's own request id."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        await served.register("sql")
        asking = ask(served, {"model": "sql@v1"}, headers={"x-request-id": "mine"})
        await engine.running_are(1)
        engine.deliver(b"{}", final=True)
        headers = (await asking).headers
        assert (headers["x-lora-version"], headers["x-lora-backend"]) == ("sql@v1", "v0")
        assert (headers["x-lora-cache"], headers["x-request-id"]) == ("fetched", "mine")
        assert float(headers["x-lora-queue-ms"]) >= 0


async def test_the_backend_is_hidden_where_it_is_to_be(tmp_path: Path) -> None:
    engine = ScriptedVllm()
    async with house(tmp_path, [engine], hide_backend=True) as served:
        asking = ask(served)
        await engine.running_are(1)
        engine.deliver(b"{}", final=True)
        assert "x-lora-backend" not in (await asking).headers


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_events_pass_as_they_are(tmp_path: Path, path: str) -> None:
    """Each when it comes; chats go to the engine's own path."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        body = {"model": "base", "stream": True, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        sent = [event("a"), event("b"), DONE]

        async def begin() -> None:
            # The head comes with the first event: until then a failure has a status of its own.
            await engine.running_are(1)
            engine.deliver(sent[0])

        beginning = asyncio.create_task(begin())
        async with served.client.stream("POST", path, json=body) as response:
            await beginning
            pieces, got = response.aiter_raw(), b""
            for number, raw in enumerate(sent):
                if number:
                    engine.deliver(raw, final=raw == DONE)
                while not got.endswith(raw):
                    got += await anext(pieces)
            assert got == b"".join(sent)
            assert response.headers["content-type"].startswith("text/event-stream")
        assert engine.forms[0].path == path
        assert engine.forms[0].streams


async def test_a_client_that_leaves_the_queue(tmp_path: Path) -> None:
    """Its request ends without having run."""
    engine = ScriptedVllm(seats=1)
    async with house(tmp_path, [engine]) as served:
        running = ask(served)
        await engine.running_are(1)
        waiting = ask(served)
        await until(lambda: served.gateway.state.waiting.requests == 1)
        waiting.cancel()
        await until(lambda: served.gateway.state.waiting.requests == 0)
        engine.deliver(b"{}", final=True)
        assert (await running).status_code == 200
        assert len(engine.forms) == 1
        await until(lambda: not served.gateway.tickets)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_a_running_request(tmp_path: Path, streams: bool, begun: bool) -> None:
    """The engine's seat is free at once."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        asking = ask(served, {"stream": streams})
        await engine.running_are(1)
        if begun and streams:
            engine.deliver(event("a"))
        asking.cancel()
        await engine.running_are(0)
        assert len(engine.cancelled) == 1
        await until(lambda: not served.gateway.tickets and not served.gateway.state.requests)


async def test_an_engines_own_error_passes_unchanged(tmp_path: Path) -> None:
    """With the engine's status and words, and no advice to send it again."""
    engine = ScriptedVllm()
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    async with house(tmp_path, [engine]) as served:
        for stream in (False, True):
            asking = ask(served, {"stream": stream})
            await engine.running_are(1)
            engine.fail(Fault.REJECTED, "too long", HttpRejection(400, body))
            response = await asking
            assert (response.status_code, response.content) == (400, body)
            assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "body", [b"Internal Server Error", b"<html>Bad Gateway</html>", b'"no"', b"", b"\xff", b"[" * 10**5]
)
async def test_an_engines_own_error_that_is_no_json_becomes_json(tmp_path: Path, body: bytes) -> None:
    """As all errors are: what a client's library reads is there, and the engine's status."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        for stream in (False, True):
            asking = ask(served, {"stream": stream})
            await engine.running_are(1)
            engine.fail(Fault.REJECTED, "it said no", HttpRejection(502, body))
            response = await asking
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (502, 502, "server_error")
            assert (error["message"], error["reason"]) == ("it said no", "backend_rejected")
            assert response.headers["x-should-retry"] == "false"


async def test_an_error_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    """It is the stream's last event, and nothing says that the answer is complete."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        asking = ask(served, {"stream": True})
        await engine.running_are(1)
        engine.deliver(event("a"))
        await until(lambda: not any(ticket.replies for ticket in served.gateway.tickets.values()))
        engine.fail(Fault.REJECTED, "the engine gave up", tokens=1)
        response = await asking
        first, last, rest = response.text.split("\n\n")
        assert (response.status_code, first, rest) == (200, event("a").decode().strip(), "")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["reason"], error["type"]) == ("backend_failed", "server_error")
        assert "the engine gave up" in error["message"]


async def test_refusals_have_their_status_and_when_to_come_back(tmp_path: Path) -> None:
    """From the one table that every front has."""
    engine = ScriptedVllm(seats=1)
    async with house(tmp_path, [engine], queue={"queued_max": 1}) as served:
        await served.register("sql", allow=("blue",))
        running = ask(served)
        await engine.running_are(1)
        waiting = ask(served, headers={"x-lora-deadline-ms": "200"})
        await until(lambda: served.gateway.state.waiting.requests == 1)
        full = await ask(served)
        assert (full.status_code, full.headers["retry-after"], full.headers["x-should-retry"]) == (429, "1", "true")
        assert full.json()["error"]["reason"] == "queue_full"
        assert full.json()["error"]["type"] == "rate_limit_error"
        late = await waiting
        assert (late.status_code, late.json()["error"]["reason"]) == (504, "expired")
        assert late.headers["x-should-retry"] == "false"
        unknown = await ask(served, {"model": "sqll"}, headers={"x-lora-tenant": "blue"})
        assert unknown.status_code == 404
        assert unknown.json()["error"] == {
            "message": 'unknown adapter "sqll"; did you mean sql?',
            "type": "invalid_request_error",
            "param": "model",
            "code": 404,
            "reason": "model_not_found",
        }
        shown = await served.client.get("/v1/models/sqll", headers={"x-lora-tenant": "blue"})
        assert (shown.status_code, shown.json()) == (404, unknown.json())
        for model in ("sql@v7", "sql@aaaaaaaaaaaa"):
            response = await ask(served, {"model": model}, headers={"x-lora-tenant": "blue"})
            assert (response.status_code, response.json()["error"]["reason"]) == (404, "model_not_found")
        assert (await ask(served, {"model": "sql"})).status_code == 404
        draining = asyncio.create_task(served.gateway.drain())
        await until(lambda: served.gateway.state.draining)
        gone = await ask(served)
        assert (gone.status_code, gone.json()["error"]["reason"], gone.headers["retry-after"]) == (503, "draining", "1")
        engine.deliver(b"{}", final=True)
        assert (await running).status_code == 200
        await draining


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body must be an object at line 1 column 1 (byte 0)"),
        (b'{"model":"base",}', "a name in quotes is missing at line 1 column 17 (byte 16)"),
        (b'{"prompt":"x"}', 'the body must have "model", a string'),
        (b'{"model":7,"prompt":"x"}', 'the body must have "model", a string'),
        (b'{"model":"base","model":"base","prompt":"x"}', 'the body has "model" twice'),
        (b'{"model":"base","stream":"true","prompt":"x"}', '"stream" must be true or false'),
        (b'{"model":"base","max_tokens":"4","prompt":"x"}', '"max_tokens" must be a whole number'),
        (b'{"model":"base"}', '"prompt" must be a text'),
        (b'{"model":"\\ud800","prompt":"x"}', "the body has half of a surrogate pair"),
        (b'{"model":"base","prompt":"\\ud800"}', "the body has half of a surrogate pair"),
        (b'{"model":"base","x":' + b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_bodies_that_are_refused(tmp_path: Path, body: bytes, sentence: str) -> None:
    """In OpenAI's form, with the place of what is wrong."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        response = await ask(served, body)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert sentence in error["message"]
        assert not served.gateway.tickets


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"x-lora-tenent": "x"}, 'unknown header "x-lora-tenent"; did you mean "x-lora-tenant"?'),
        ({"x-lora-name": "sql"}, 'an adapter is named by "model"'),
        ({"x-lora-deadline-ms": "soon"}, 'lora_deadline_ms is "soon"'),
        ({"x-lora-class": "golden"}, 'unknown class "golden"'),
    ],
)
async def test_headers_that_are_refused(tmp_path: Path, headers: dict[str, str], sentence: str) -> None:
    """A slip of a name must not be passed over in silence."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        response = await ask(served, headers=headers)
        assert response.status_code == 400
        assert sentence in response.json()["error"]["message"]


async def test_bodies_are_bounded(tmp_path: Path) -> None:
    """By what is sent, whether or not its length is said first."""
    async with house(tmp_path, [ScriptedVllm()], listeners={"http": {"body_bytes_max": 4096}}) as served:

        async def pieces() -> Any:
            for _ in range(8):
                yield b"x" * 1024

        for content in (b"x" * 5000, pieces()):
            response = await served.client.post(COMPLETIONS, content=content)
            assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
            assert "listeners.http.body_bytes_max" in response.json()["error"]["message"]


async def test_paths_and_methods(tmp_path: Path) -> None:
    """In OpenAI's form below /v1; the probes are as they were."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        response = await served.client.get("/v1/audio/speech")
        assert (response.status_code, response.json()["error"]["reason"]) == (404, "not_found")
        response = await served.client.get(COMPLETIONS)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json()["error"]["reason"] == "method_not_allowed"
        assert (await served.client.get("/livez")).text == "ok\n"


async def test_a_users_requests_are_one_session(tmp_path: Path) -> None:
    """The same for the same user, so that a share of users tries a version out; nobody's name is in it."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        recorder = Recorder()
        served.gateway.observe(recorder)
        for body, headers in (
            ({"user": "me@example.com"}, {}),
            ({"user": "me@example.com"}, {}),
            ({"user": "you"}, {}),
            ({"user": "me@example.com"}, {"x-lora-session": "s1"}),
            ({}, {}),
        ):
            asking = ask(served, body, headers=headers)
            await engine.running_are(1)
            engine.deliver(b"{}", final=True)
            await asking
        sessions = [event.session for event in recorder.events if isinstance(event, Received)]
        assert sessions[0] == sessions[1] != sessions[2]
        assert len({*sessions}) == 4
        assert sessions[4] == ""
        assert "example" not in "".join(sessions)
        assert "s1" not in sessions


async def test_admission_counts_what_is_asked(tmp_path: Path) -> None:
    """Token ids by number, text by bytes, answers by how many there are to be."""
    engine = ScriptedVllm(seats=2)
    async with house(tmp_path, [engine]) as served:
        running = ask(served, {"n": 2})
        await engine.running_are(1)
        for body, tokens, requests in (
            ({"prompt": [1, 2, 3], "max_tokens": 10}, 13, 1),
            ({"prompt": "née", "max_tokens": 10, "n": 2}, 24, 1),
            ({"prompt": ["ab", "cd"], "max_tokens": 5}, 14, 2),
            ({"prompt": [[1], [2, 3]]} | {"max_tokens": None}, 35, 2),
        ):
            waiting = ask(served, body)
            await until(lambda count=requests: served.gateway.state.waiting.requests == count)
            assert served.gateway.state.waiting.tokens == tokens, body
            waiting.cancel()
            await until(lambda: served.gateway.state.waiting.requests == 0)
        engine.deliver(b"{}", final=True)
        await running


async def test_models_of_a_tenant(tmp_path: Path) -> None:
    """An adapter that only others may use is not shown, by itself neither; new content keeps the versions before."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        await served.register("sql", seed=1)
        await served.register("sql", seed=2)
        await served.register("secret", seed=3, allow=("blue",))

        async def ids(query: str = "", **headers: str) -> list[str]:
            response = await served.client.get(f"/v1/models{query}", headers=headers)
            return [one["id"] for one in response.json()["data"]]

        blue = {"x-lora-tenant": "blue"}
        assert await ids() == ["tiny-llama", "sql"]
        assert await ids("?versions=true") == ["tiny-llama", "sql", "sql@v1", "sql@v2"]
        assert await ids(**blue) == ["tiny-llama", "secret", "sql"]
        for model in ("secret", "secret@v1"):  # nothing tells it from a name that is not there
            hidden, nobodys = [await served.client.get(f"/v1/models/{name}") for name in (model, "vanity")]
            assert hidden.status_code == nobodys.status_code == 404
            assert hidden.text == nobodys.text.replace("vanity", "secret")
        assert (await served.client.get("/v1/models/secret", headers=blue)).json()["id"] == "secret"
        assert (await served.client.get("/v1/models/sql@v1")).json()["root"] == "sql@v1"


async def test_only_adapters(tmp_path: Path) -> None:
    """Where the base model is not to be asked it is refused, and not listed."""
    async with house(tmp_path, [ScriptedVllm()], base_requests="refuse") as served:
        await served.register("sql")
        refused = await ask(served)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert 'name an adapter in "model"' in refused.json()["error"]["message"]
        assert [one["id"] for one in (await served.client.get("/v1/models")).json()["data"]] == ["sql"]


async def test_what_only_a_triton_serves_is_asked_in_its_words(tmp_path: Path) -> None:
    """With a vLLM beside it that cannot serve the adapter: what it could do for others is no help."""
    vllm, triton = ScriptedVllm(), ScriptedBackend("t0")
    vllm.facts = replace(vllm.facts, rank_max=1)
    async with house(tmp_path, [vllm, triton]) as served:
        await served.register("sql")
        refused = await ask(served, {"model": "sql", "echo": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
        assert "serve the model by vLLM" in refused.json()["error"]["message"]
        chat = await ask(served, {"model": "sql", "messages": [{"role": "user", "content": "x"}]}, CHAT)
        assert chat.status_code == 400
        assert "t0 takes text only and no chat template" in chat.json()["error"]["message"]
        running = ask(served, {"model": "sql"})
        await triton.running_are(1)
        running.cancel()
        await triton.running_are(0)
        base = ask(served, {"n": 2})
        await vllm.running_are(1)
        vllm.deliver(b"{}", final=True)
        assert (await base).status_code == 200


@pytest.mark.parametrize(
    ("members", "param"),
    [({"n": 0}, "n"), ({"n": 2, "best_of": 1}, "best_of"), ({"best_of": 0}, "best_of"), ({"n": 0, "best_of": 0}, "n")],
)
async def test_answers_that_cannot_be_counted_out(tmp_path: Path, members: dict[str, int], param: str) -> None:
    """OpenAI's API has n from 1 on, and returns the best n of best_of."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        response = await ask(served, members)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, 400, param)
        assert not engine.forms


async def test_base_models_are_told_apart(tmp_path: Path) -> None:
    """A base model's name goes to the engines that serve it; a name of neither is nobody's."""
    one, other = ScriptedVllm("v0"), ScriptedVllm("v1")
    other.facts = replace(other.facts, base_models=("org/other", "alias"))
    async with house(tmp_path, [one, other]) as served:
        for model, engine in (("tiny-llama", one), ("org/other", other), ("alias", other)):
            for _ in range(3):
                asking = ask(served, {"model": model})
                await engine.running_are(1)
                engine.deliver(b"{}", final=True)
                assert (await asking).status_code == 200
            shown = (await served.client.get(f"/v1/models/{model}")).json()
            assert (shown["id"], shown["parent"]) == (model, None)
        assert (len(one.forms), len(other.forms)) == (3, 6)
        assert (await ask(served, {"model": "org/third"})).status_code == 404
        listed = (await served.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["tiny-llama", "org/other"]


async def test_nothing_serves_it_at_the_moment(tmp_path: Path) -> None:
    """Draining engines take nothing new: come again."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        served.gateway.set_drain("v0", True)
        response = await ask(served)
        assert (response.status_code, response.json()["error"]["reason"]) == (503, "no_backend")
        assert response.headers["retry-after"] == "1"
