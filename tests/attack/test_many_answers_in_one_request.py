"""A request of the OpenAI API that asks for many answers takes as many seats, and the answer is the engine's own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends.api import HttpRejection
from sidecar.core.enums import Fault
from tests.integration.test_openai_relay import COMPLETIONS, ask
from tests.integration.test_openai_triton import in_front
from tests.integration.test_vllm import fronted
from tests.kit.openai_house import ScriptedVllm, house
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.vllm_emulated import Client, running_vllm

LISTS: list[Any] = [["a", "bcd", "é\n"], [[1, 2], [3], [4, 5, 6]], ["only"], [[7, 8]], ["same", "same"]]


@asynccontextmanager
async def both(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Serving, Client, Client]]:
    """Yield a sidecar, a client of it, and one that asks its engine directly."""
    write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "shared").mkdir()
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, **options) as (engine, direct),
        fronted([engine], tmp_path) as served,
        Client(served.sidecar.http_address) as client,
    ):
        yield served, client, direct


def without_id(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("id", "created")}


@pytest.mark.parametrize("n", [1, 2])
async def test_a_list_is_answered_as_the_engine_answers_it(tmp_path: Path, n: int) -> None:
    """Choices, their order and their numbers, texts, tokens and the sums are those of the engine asked directly."""
    more = {"n": n, "temperature": 1 if n > 1 else 0, "return_token_ids": True, "ignore_eos": True}
    async with both(tmp_path) as (_, client, direct):
        for prompts in LISTS:
            said = (await client.complete("base", prompts, **more)).json()
            assert without_id(said) == without_id((await direct.complete("base", prompts, **more)).json())
            assert [choice["index"] for choice in said["choices"]] == list(range(n * len(prompts)))


@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
async def test_a_streamed_list_is_the_engines_own(tmp_path: Path, options: dict[str, bool] | None) -> None:
    """Each choice has the events that it has when the engine is asked; one id, one end, the counts added up."""
    more = {"tokens": 5, "n": 2, "temperature": 1, "return_token_ids": True, "stream_options": options}
    async with both(tmp_path) as (_, client, direct):
        for prompts in LISTS:
            said = await client.completion_events("base", prompts, **more)
            wanted = await direct.completion_events("base", prompts, **more)
            assert by_choice(said) == by_choice(wanted)
            assert said[-1] == wanted[-1] == "[DONE]"
            assert len({event["id"] for event in said[:-1]}) == 1


def by_choice(events: list[Any]) -> dict[int | None, list[Any]]:
    """Return the events of each choice, and under None those of none: between choices any order is right."""
    found: dict[int | None, list[Any]] = {}
    for each in events[:-1]:
        number = each["choices"][0]["index"] if each["choices"] else None
        found.setdefault(number, []).append(without_id(each))
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt", [["ok", "x" * 5000], [[1], []], [], ["a", 1], [["a"], ["b"]], ["a", ["b"]], [1, "a"]]
)
async def test_a_list_that_the_engine_refuses_is_refused(tmp_path: Path, prompt: Any, stream: bool) -> None:
    """As a whole: one prompt that is not as it must be leaves no answer to the others."""
    async with both(tmp_path, max_seq_tokens=256) as (served, client, direct):
        body = {"model": "base", "prompt": prompt, "max_tokens": 4, "stream": stream}
        answers = [await each.http.post(COMPLETIONS, json=body) for each in (client, direct)]
        ends = [answer.status_code if answer.status_code != 200 else answer.text.count('"error"') for answer in answers]
        assert ends[0] == ends[1] or (stream and ends == [1, 400])  # others may have begun before it is refused
        await until(lambda: not served.state.requests)


async def test_each_prompt_takes_a_seat_of_its_own(tmp_path: Path) -> None:
    """Seven prompts on two seats: two run at once, and somebody else's request comes between them."""
    engine = ScriptedVllm(seats=2)
    async with house(tmp_path, [engine]) as served:
        listing = ask(served, {"prompt": [f"p{number}" for number in range(7)]}, headers={"x-lora-tenant": "many"})
        await engine.running_are(2)
        await until(lambda: served.gateway.state.queued == 5)
        assert served.gateway.state.backends["v0"].in_flight == 2
        other = ask(served, {"prompt": "mine"}, headers={"x-lora-tenant": "one"})
        await until(lambda: served.gateway.state.queued == 6)
        for number in range(8):
            engine.deliver(answer_with(number), final=True)
            await until(lambda done=number + 1: len(engine.forms) >= min(8, done + 2))
        assert (await other).status_code == 200
        assert len((await listing).json()["choices"]) == 7
        place = next(number for number, form in enumerate(engine.forms) if b"mine" in form.before + form.after)
        assert place < 7


def answer_with(tokens: int) -> bytes:
    choice = {"index": 0, "text": "x"}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    return json.dumps(
        {"id": f"cmpl-{tokens}", "created": 1, "model": "base", "choices": [choice], "usage": usage}
    ).encode()


@pytest.mark.parametrize(
    ("member", "path"), [("n", "completions"), ("best_of", "completions"), ("n", "chat/completions")]
)
async def test_answers_to_one_prompt_take_a_seat_each(tmp_path: Path, member: str, path: str) -> None:
    """Three of four seats are taken by one request that asks for three answers."""
    engine = ScriptedVllm(seats=4)
    async with house(tmp_path, [engine]) as served:
        chat = {"messages": [{"role": "user", "content": "x"}]}
        first = ask(served, {member: 3} | chat, path=f"/v1/{path}")
        await engine.running_are(1)
        others = [ask(served) for _ in range(3)]
        await engine.running_are(2)
        await until(lambda: served.gateway.state.queued == 2)
        for _ in range(4):
            engine.deliver(answer_with(1), final=True)
            await until(lambda: bool(engine.running) or served.gateway.state.queued == 0)
        assert [(await each).status_code for each in (first, *others)] == [200] * 4


async def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    """Clearly, and for good: a client's library is not to try it again."""
    async with house(tmp_path, [ScriptedVllm(seats=4)]) as served:
        response = await ask(served, {"n": 5})
        assert (response.status_code, response.headers["x-should-retry"]) == (400, "false")
        assert "5 sequences at once and it has seats for 4" in response.json()["error"]["message"]


async def test_a_client_that_leaves_takes_all_parts_along(tmp_path: Path) -> None:
    """Those that run and those that wait."""
    engine = ScriptedVllm(seats=2)
    async with house(tmp_path, [engine]) as served:
        asking = ask(served, {"prompt": ["a", "b", "c", "d"], "stream": True})
        await engine.running_are(2)
        await until(lambda: served.gateway.state.queued == 2)
        asking.cancel()
        await until(lambda: not served.gateway.state.requests and not served.gateway.tickets)
        assert len(engine.cancelled) == 2


async def test_one_part_that_fails_ends_all(tmp_path: Path) -> None:
    """With its own words; what may have run is not to be sent again by a library."""
    engine = ScriptedVllm(seats=2)
    async with house(tmp_path, [engine]) as served:
        asking = ask(served, {"prompt": ["a", "b", "c"]})
        await engine.running_are(2)
        engine.fail(Fault.REJECTED, "no", HttpRejection(400, b'{"error":{"message":"no"}}'))
        response = await asking
        assert (response.status_code, response.json()["error"]["message"]) == (400, "no")
        await until(lambda: not served.gateway.state.requests and not served.gateway.tickets)
        assert len(engine.cancelled) >= 1


async def test_lists_are_bounded(tmp_path: Path) -> None:
    """In prompts; and in bytes, of which each prompt takes the rest of the body along."""
    record = {"listeners": {"http": {"prompts_max": 3, "body_bytes_max": 10_000}}}
    async with house(tmp_path, [ScriptedVllm()], **record) as served:
        for body, words in (
            ({"prompt": ["a"] * 4}, "4 prompts; at most 3"),
            ({"prompt": ["a"] * 3, "x": "y" * 5000}, "takes the other"),
        ):
            response = await ask(served, body)
            assert response.status_code == 400
            assert words in response.json()["error"]["message"]
        assert not served.gateway.tickets


async def test_a_triton_answers_lists_too(tmp_path: Path) -> None:
    """Text by text, each as it is answered when it is asked alone."""
    async with in_front(tmp_path, compute="llama") as (_, _, client):
        body = {"model": "a00", "max_tokens": 6, "temperature": 0}
        whole = (await client.post(COMPLETIONS, json=body | {"prompt": ["ab", "cde"]})).json()
        alone = [(await client.post(COMPLETIONS, json=body | {"prompt": prompt})).json() for prompt in ("ab", "cde")]
        assert [choice["text"] for choice in whole["choices"]] == [one["choices"][0]["text"] for one in alone]
        assert [choice["index"] for choice in whole["choices"]] == [0, 1]
