"""LlamaIndex: a chat, a stream and a completion, with what it says that they used."""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main() -> None:
    url, name = sys.argv[1:]
    reach: dict[str, Any] = {"model": name, "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    asked = [ChatMessage(role="user", content="hello")]
    model = OpenAILike(**reach, is_chat_model=True, max_tokens=12)
    streamed = OpenAILike(
        **reach, is_chat_model=True, max_tokens=12, additional_kwargs={"stream_options": {"include_usage": True}}
    )
    *_, last = streamed.stream_chat(asked)
    told = {
        "chat": counts(model.chat(asked).raw),
        "stream": counts(last.raw),
        "completion": counts(OpenAILike(**reach, is_chat_model=False, max_tokens=12).complete("hello").raw),
    }
    print(json.dumps(told))


def counts(raw: Any) -> list[int]:
    usage = raw.usage
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


if __name__ == "__main__":
    main()
