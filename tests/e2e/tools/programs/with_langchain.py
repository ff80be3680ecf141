"""LangChain: a chat, a stream, a batch, and a list of prompts, with what it says that they used."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI


def main() -> None:
    url, name = sys.argv[1:]
    reach: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": name, "max_retries": 0}
    chat = ChatOpenAI(**reach, max_tokens=12, stream_usage=True)
    whole = None
    for chunk in chat.stream("hello"):
        whole = chunk if whole is None else whole + chunk
    told = {
        "chat": chat.invoke("hello").usage_metadata,
        "stream": whole and whole.usage_metadata,
        "batch": [answer.usage_metadata for answer in chat.batch(["hello"] * 8)],
    }
    told = {what: [counts(one) for one in (used if isinstance(used, list) else [used])] for what, used in told.items()}
    prompts = OpenAI(**reach, max_tokens=12, n=1).generate(["hello", "hello"])
    print(json.dumps({**told, "prompts": prompts.llm_output and prompts.llm_output["token_usage"]}))


def counts(usage: Any) -> list[int]:
    return [usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]]


if __name__ == "__main__":
    main()
