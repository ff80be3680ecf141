"""What any server is asked: nothing here ends one, as far as its source says.

A question is a function of a server; its name is the record's. It returns JSON that two equal servers return alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from typing import Any

from tools.record.forms import answer_form
from tools.record.server import Server, lora

Question = Callable[[Server], Awaitable[Any]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def what_an_operator_asks(server: Server) -> Any:
    paths = ("/health", "/version", "/v1/models", "/health_generate", "/prometheus/metrics", "/nothing")
    return {path: answer_form(await server.get(path)) for path in paths}


async def server_info(server: Server) -> Any:
    return (await server.get("/server_info")).status_code


async def metrics_are_drained(server: Server) -> Any:
    await server.get("/metrics")
    await server.complete()
    first, second = await server.get("/metrics"), await server.get("/metrics")
    fields = sorted(first.json()[-1]) if first.json() else []
    wanted = ("iter", "numActiveRequests", "numQueuedRequests", "maxNumActiveRequests", "kvCacheStats")
    return {"first": [name for name in wanted if name in fields], "second is empty": not second.json()}


async def kv_cache_events(server: Server) -> Any:
    return (await server.post("/kv_cache_events", {})).status_code


async def a_whole_completion(server: Server) -> Any:
    answer = await server.complete()
    return answer_form(answer) | {"model": answer.json().get("model")}


async def ids_instead_of_text(server: Server) -> Any:
    return answer_form(await server.complete(detokenize=False))


async def two_prompts(server: Server) -> Any:
    answer = await server.complete(prompt=["one", "two"])
    return answer_form(answer) | {"echoes model": answer.json().get("model") == "record"}


async def a_streamed_completion(server: Server) -> Any:
    return await server.stream_form(COMPLETIONS, server.body())


async def a_stream_with_counts(server: Server) -> Any:
    return await server.stream_form(COMPLETIONS, server.body() | {"stream_options": {"continuous_usage_stats": False}})


async def a_whole_chat(server: Server) -> Any:
    return answer_form(await server.post(CHAT, server.chat_body()))


async def a_streamed_chat(server: Server) -> Any:
    return await server.stream_form(CHAT, server.chat_body() | {"stream_options": {"continuous_usage_stats": False}})


async def too_long_a_prompt(server: Server) -> Any:
    return answer_form(await server.complete(prompt=[7] * 200_000))


REFUSED: dict[str, dict[str, Any]] = {
    "unknown field": {"adapter": "x"},
    "vLLM's field": {"return_token_ids": True},
    "unknown field of an adapter": {"lora_request": {**lora(1, "/"), "rank": 8}},
    "unknown source of an adapter": {"lora_request": {**lora(1, "/"), "lora_ckpt_source": "x"}},
    "adapter without a number": {"lora_request": {"lora_name": "a", "lora_path": "/"}},
    "path that is not there": {"lora_request": lora(1, "/nowhere/at/all")},
    "no path": {"lora_request": {"lora_name": "a", "lora_int_id": 1}},
    "suffix": {"suffix": "x"},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "bias of an unknown token": {"logit_bias": {"99999999": 1}},
    "no tokens": {"max_tokens": 0},
    "unknown token": {"prompt": [99_999_999]},
    "two greedy answers": {"n": 2},
}


async def refusals(server: Server) -> Any:
    return {name: answer_form(await server.complete(**fields)) for name, fields in REFUSED.items()}


async def a_number_as_a_string(server: Server) -> Any:
    number, folder = server.new_number(), server.copies.plain()
    named = await server.text(lora_request=lora(str(number), folder))
    return {"is the number": named == await server.text(folder, number)}


async def an_adapter_changes_the_answer(server: Server) -> Any:
    base, there, back = await server.text(), server.copies.plain(), server.copies.negated()
    texts = {base, await server.text(there), await server.text(back)}
    return {"lora is on": len(texts) > 1}


async def a_number_keeps_its_first_content(server: Server) -> Any:
    number, folder = server.new_number(), server.copies.plain()
    first = await server.text(folder, number)
    elsewhere = await server.text(server.copies.negated(), number)
    server.copies.negated(folder)
    return {
        "another path": elsewhere == first,
        "changed files": await server.text(folder, number) == first,
        "a new number": await server.text(folder) == first,
    }


async def the_path_of_a_known_number(server: Server) -> Any:
    number, folder = server.new_number(), server.copies.plain()
    await server.text(folder, number)
    shutil.rmtree(folder)
    return answer_form(await server.complete(folder, number))


async def alpha_pattern(server: Server) -> Any:
    """A pattern that makes every scale zero, if it is read."""
    plain, silenced = server.copies.plain(), server.copies.configured(alpha_pattern={r".*": 0})
    return {"is ignored": await server.text(plain) == await server.text(silenced)}


async def the_rank_of_the_configuration(server: Server) -> Any:
    plain, lying = server.copies.plain(), server.copies.configured(r=1)
    return {"is ignored": await server.text(plain) == await server.text(lying)}


async def a_module_of_an_unknown_name(server: Server) -> Any:
    plain, more = server.copies.plain(), server.copies.with_unknown_module()
    return {"is ignored": await server.text(plain) == await server.text(more)}


async def loads_that_fail(server: Server) -> Any:
    """They end a server of 1.2."""
    folders = {"no configuration": server.copies.without_config(), "corrupt": server.copies.corrupt()}
    found = {name: answer_form(await server.complete(folder)) for name, folder in folders.items()}
    good = server.copies.plain()
    for name, number in (("negative", -1), ("larger than 64 bits", 2**70)):
        answer = await server.complete(good, number)
        found[name] = {"status": answer.status_code, "keys": list(answer.json())}
    return found


async def streams_whose_load_fails(server: Server) -> Any:
    """They end a server of 1.2."""
    folder = server.copies.without_config()
    return {
        "completion": await server.stream_form(COMPLETIONS, server.body(folder)),
        "chat": await server.stream_form(CHAT, server.chat_body(folder)),
    }


QUESTIONS: tuple[Question, ...] = (
    what_an_operator_asks,
    server_info,
    metrics_are_drained,
    kv_cache_events,
    a_whole_completion,
    ids_instead_of_text,
    two_prompts,
    a_streamed_completion,
    a_stream_with_counts,
    a_whole_chat,
    a_streamed_chat,
    too_long_a_prompt,
    refusals,
)
OF_ADAPTERS: tuple[Question, ...] = (
    an_adapter_changes_the_answer,
    a_number_as_a_string,
    a_number_keeps_its_first_content,
    the_path_of_a_known_number,
    alpha_pattern,
    the_rank_of_the_configuration,
    a_module_of_an_unknown_name,
)
OF_FAILING_LOADS: tuple[Question, ...] = (loads_that_fail, streams_whose_load_fails)


def questions_for(server: Server) -> tuple[Question, ...]:
    """Return what a server can be asked without ending it."""
    asked = QUESTIONS + (OF_ADAPTERS if server.has_adapter else ())
    return asked + (OF_FAILING_LOADS if server.has_adapter and server.era != "1.2" else ())
