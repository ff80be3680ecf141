"""litellm: completions and streams by provider, and by a router's names, with what it bills."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

PRICES = {"input_cost_per_token": 0.001, "output_cost_per_token": 1.0}


def main() -> None:
    url, name = sys.argv[1:]
    reach: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", **PRICES}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    told = {}
    for provider in ("hosted_vllm", "openai"):
        model = f"{provider}/{name}"
        told[provider] = billed(litellm.completion(model=model, num_retries=0, **reach, **asked))
        events = list(litellm.completion(model=model, num_retries=0, **reach, **streamed))
        told[f"{provider} stream"] = billed(litellm.stream_chunk_builder(events, messages=asked["messages"]))
    router = litellm.Router([{"model_name": "vl/*", "litellm_params": {"model": "hosted_vllm/*", **reach}}])
    told["router"] = billed(router.completion(model=f"vl/{name}", **asked))
    print(json.dumps(told))


def billed(answer: Any) -> list[float]:
    """Return the tokens of a prompt, those of its answer, both, and what they cost."""
    usage = answer.usage
    cost = litellm.completion_cost(answer, custom_cost_per_token=PRICES)
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, round(cost, 6)]


if __name__ == "__main__":
    main()
