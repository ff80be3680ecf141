"""The OpenAI SDK: chats and completions, whole and streamed, several prompts and choices, many at once."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

CHAT: Any = [{"role": "user", "content": "hello"}]
STREAMED: Any = {"stream": True, "stream_options": {"include_usage": True}}


def main() -> None:
    url, name = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    told: dict[str, Any] = {"models": [model.id for model in client.models.list()]}
    for what, fields in {
        "chat": {"max_tokens": 12},
        "newer chat": {"max_completion_tokens": 12},
        "streamed chat": {"max_tokens": 12, **STREAMED},
    }.items():
        told[what] = answered(client.chat.completions.create, model=name, messages=CHAT, **fields)
    for what, fields in {
        "completion": {},
        "streamed completion": STREAMED,
        "prompts": {"prompt": ["hello", "hello!"]},
        "choices": {"n": 2},
        "at least": {"extra_body": {"min_tokens": 12}},
        "of nobody": {"model": "nobody"},
    }.items():
        asked = {"model": name, "prompt": "hello", "max_tokens": 12, **fields}
        told[what] = answered(client.completions.create, **asked)
    told["at once"] = asyncio.run(at_once(url, name))
    print(json.dumps(told))


def answered(create: Any, **fields: Any) -> dict[str, Any]:
    """Return what an answer used, and its choices or its events that have text; or the error."""
    try:
        answer = create(**fields)
        if not fields.get("stream"):
            return used(answer)
        *events, last = answer
    except openai.APIStatusError as error:
        return {"status": error.status_code, "code": error.code, "error": error.message}
    with_text = [choice for event in events for choice in event.choices if text_of(choice)]
    return {**counts(last.usage), "texts": len(with_text)}


def used(answer: Any) -> dict[str, int]:
    return {**counts(answer.usage), "choices": len(answer.choices)}


def counts(usage: Any) -> dict[str, int]:
    return {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "total": usage.total_tokens}


def text_of(choice: Any) -> str:
    return str(choice.delta.content or "" if hasattr(choice, "delta") else choice.text)


async def at_once(url: str, name: str) -> list[dict[str, int]]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = [client.chat.completions.create(model=name, messages=CHAT, max_tokens=12) for _ in range(40)]
        return [used(answer) for answer in await asyncio.gather(*asked)]


if __name__ == "__main__":
    main()
