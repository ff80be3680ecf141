"""The threaded client: one stream with a callback, ids that are used again, and the final response as the end."""

from __future__ import annotations

import json
import queue
from typing import Any

import tritonclient.grpc as triton
from adapter import PROMPTS, TEXTS, answer_of, asked, text_inputs, token_inputs


def main() -> None:
    address, lora = asked(__doc__)
    answers: dict[str, Any] = {}
    arrived: queue.Queue[Any] = queue.Queue()

    def ask(key: str, model: str, inputs: list[Any], request_id: str) -> None:
        client.async_stream_infer(
            model, inputs + lora["inputs"], request_id=request_id, parameters=lora["parameters"], priority=1
        )
        answers[key] = []
        while True:
            result, error = arrived.get(timeout=60)
            assert error is None, error
            response = result.get_response()
            assert response.id == request_id
            answers[key] += answer_of(result)
            if response.parameters["triton_final_response"].bool_param:
                return

    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for number, ids in enumerate(PROMPTS):
            ask(f"tokens-{number}", "tensorrt_llm", token_inputs(ids, streaming=True), "again")
            ask(f"whole-{number}", "tensorrt_llm", token_inputs(ids, streaming=False), "")
        for number, text in enumerate(TEXTS):
            ask(f"text-{number}", "ensemble", text_inputs(text, streaming=True), str(number))
        client.stop_stream()
    print(json.dumps(answers, sort_keys=True))


if __name__ == "__main__":
    main()
