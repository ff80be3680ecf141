"""The threaded client: a stream for each request, whose side the program closes when it has sent that."""

from __future__ import annotations

import json
import queue
from typing import Any

import tritonclient.grpc as triton
from adapter import PROMPTS, TEXTS, answer_of, asked, text_inputs, token_inputs


def main() -> None:
    address, lora = asked(__doc__)
    answers: dict[str, Any] = {}

    def ask(key: str, model: str, inputs: list[Any]) -> None:
        arrived: queue.Queue[Any] = queue.Queue()
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: arrived.put((result, error)))
            client.async_stream_infer(model, inputs + lora["inputs"], request_id=key, parameters=lora["parameters"])
            client.stop_stream()  # it waits for the answer
        answers[key] = []
        while not arrived.empty():
            result, error = arrived.get()
            assert error is None, error
            assert result.get_response().id == key
            answers[key] += answer_of(result)

    for number, ids in enumerate(PROMPTS):
        ask(f"tokens-{number}", "tensorrt_llm", token_inputs(ids, streaming=True))
    for number, text in enumerate(TEXTS):
        ask(f"text-{number}", "ensemble", text_inputs(text, streaming=True))
    print(json.dumps(answers, sort_keys=True))


if __name__ == "__main__":
    main()
