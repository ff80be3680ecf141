"""The asyncio client: many streams at once, and many requests on one of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import tritonclient.grpc.aio as triton
from adapter import PROMPTS, TEXTS, answer_of, asked, text_inputs, token_inputs


async def answers_of(client: triton.InferenceServerClient, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Send requests on one stream; return what came for each id."""

    async def each() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield request

    answers: dict[str, Any] = {request["request_id"]: [] for request in requests}
    async for result, error in client.stream_infer(each()):
        assert error is None, error
        if result.get_response().outputs:
            answers[result.get_response().id] += answer_of(result)
    return answers


async def main() -> None:
    address, lora = asked(__doc__)

    def request(request_id: str, model: str, inputs: list[Any]) -> dict[str, Any]:
        return {
            "model_name": model,
            "inputs": inputs + lora["inputs"],
            "request_id": request_id,
            "parameters": lora["parameters"],
            "enable_empty_final_response": True,
        }

    tokens = [
        request(f"tokens-{number}", "tensorrt_llm", token_inputs(ids, streaming=True))
        for number, ids in enumerate(PROMPTS)
    ]
    texts = [
        request(f"text-{number}", "ensemble", text_inputs(text, streaming=True)) for number, text in enumerate(TEXTS)
    ]
    many = [
        request(f"many-{number}", "tensorrt_llm", token_inputs([256, number], streaming=True)) for number in range(20)
    ]
    async with triton.InferenceServerClient(address) as client:
        streams = [tokens, texts, many, *([one] for one in tokens)]
        answers = await asyncio.gather(*(answers_of(client, stream) for stream in streams))
    for alone in answers[3:]:
        assert alone.items() <= answers[0].items()
    print(json.dumps({key: value for found in answers for key, value in found.items()}, sort_keys=True))


if __name__ == "__main__":
    asyncio.run(main())
