"""Ask by the unmodified SDKs: `ask_sdks.py URL PATHS MODEL…`, in vLLM's environment; prints an object a path and model.

PATHS are names of the functions below, with commas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import openai

TEXT, TOKENS = "def quicksort(items):", 8


def responses(url: str, model: str, **extra: Any) -> dict[str, Any]:
    asked = {"model": model, "input": TEXT, "max_output_tokens": TOKENS, "temperature": 0} | extra
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return {
        "text": whole.output_text,
        "streamed": deltas,
        "model": whole.model,
        "models": sorted({event.response.model for event in events if hasattr(event, "response")}),
        "last": events[-1].type,
        "input_tokens": whole.usage.input_tokens,
        "output_tokens": whole.usage.output_tokens,
        "store": whole.model_dump().get("store"),
    }


def messages(url: str, model: str, **extra: Any) -> dict[str, Any]:
    asked = {"model": model, "max_tokens": TOKENS, "messages": [{"role": "user", "content": TEXT}]}
    extra = {"extra_body": {"temperature": 0}} | extra
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(**asked, **extra)
        with client.messages.stream(**asked, **extra) as stream:
            events = list(stream)
            final = stream.get_final_message()
    return {
        "text": "".join(block.text for block in whole.content if block.type == "text"),
        "streamed": "".join(block.text for block in final.content if block.type == "text"),
        "model": whole.model,
        "models": [final.model],
        "last": events[-1].type,
        "input_tokens": whole.usage.input_tokens,
        "output_tokens": whole.usage.output_tokens,
    }


def embeddings(url: str, model: str, **extra: Any) -> dict[str, Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        told = client.embeddings.create(model=model, input=[TEXT, "hello"], **extra)
    return {
        "vectors": [each.embedding for each in told.data],
        "model": told.model,
        "input_tokens": told.usage.prompt_tokens,
    }


ASKS: dict[str, Callable[..., dict[str, Any]]] = {each.__name__: each for each in (responses, messages, embeddings)}


def main() -> None:
    url, paths, *models = sys.argv[1:]
    for path in paths.split(","):
        for model in models:
            try:
                told = ASKS[path](url, model)
            except (openai.APIStatusError, anthropic.APIStatusError) as error:
                told = {"status": error.status_code, "message": str(error.message), "body": error.body}
            print(json.dumps({"path": path, "asked": model} | told), flush=True)


main()
