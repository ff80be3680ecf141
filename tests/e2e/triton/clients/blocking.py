"""The blocking client: one call after another, and some by threads of the client's own."""

from __future__ import annotations

import json
import queue
from typing import Any

import tritonclient.grpc as triton
from adapter import PROMPTS, TEXTS, answer_of, asked, text_inputs, token_inputs


def main() -> None:
    address, lora = asked(__doc__)
    answers: dict[str, Any] = {}
    with triton.InferenceServerClient(address) as client:
        for number, ids in enumerate(PROMPTS):
            result = client.infer(
                "tensorrt_llm",
                token_inputs(ids, streaming=False) + lora["inputs"],
                model_version="1",
                request_id=f"tokens-{number}",
                priority=3,
                sequence_id=7,
                sequence_start=True,
                sequence_end=True,
                parameters=lora["parameters"],
            )
            assert result.get_response().id == f"tokens-{number}"
            answers[f"tokens-{number}"] = answer_of(result)
        for number, text in enumerate(TEXTS):
            inputs = text_inputs(text, streaming=False) + lora["inputs"]
            answers[f"text-{number}"] = answer_of(client.infer("ensemble", inputs, parameters=lora["parameters"]))
        done: queue.Queue[Any] = queue.Queue()
        for number in range(16):
            client.async_infer(
                "tensorrt_llm",
                token_inputs([256, number], streaming=False) + lora["inputs"],
                lambda result, error, number=number: done.put((number, result, error)),
                parameters=lora["parameters"],
            )
        for _ in range(16):
            number, result, error = done.get(timeout=60)
            assert error is None, error
            answers[f"thread-{number}"] = answer_of(result)
    print(json.dumps(answers, sort_keys=True))


if __name__ == "__main__":
    main()
