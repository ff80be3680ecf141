"""A client on the server's machine: its prompts and its answers lie in shared memory, and messages carry neither."""

from __future__ import annotations

import json
import queue
import time
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from adapter import PROMPTS, asked, token_inputs
from tritonclient.utils import InferenceServerException

TOKENS = 12
IDS, LENGTH = "output_ids", "sequence_length"


def in_region(ids: list[int], streaming: bool, memory: SharedMemory) -> list[triton.InferInput]:
    """Return the inputs of the core model with the prompt in shared memory."""
    prompt = np.array([ids], np.int32)
    memory.buf[: prompt.nbytes] = prompt.tobytes()
    held = triton.InferInput("input_ids", list(prompt.shape), "INT32")
    held.set_shared_memory("program_prompt", prompt.nbytes)
    return [held, *token_inputs(ids, streaming, TOKENS)[1:]]


def outputs() -> list[triton.InferRequestedOutput]:
    """Return both outputs, to be written to shared memory."""
    made = []
    for name, offset, size in ((IDS, 0, 4 * TOKENS), (LENGTH, 4 * TOKENS, 4)):
        output = triton.InferRequestedOutput(name)
        output.set_shared_memory("program_answer", size, offset)
        made.append(output)
    return made


def tokens_in(result: triton.InferResult, memory: SharedMemory) -> list[int]:
    """Return the tokens that a response has put into shared memory."""
    assert not any(result.get_response().raw_output_contents)
    (length,) = np.frombuffer(bytes(memory.buf[4 * TOKENS : 4 * TOKENS + 4]), np.int32)
    shape = result.get_output(IDS).shape
    assert shape[-1] == length
    return list(np.frombuffer(bytes(memory.buf[: 4 * length]), np.int32).tolist())


def streamed(client: triton.InferenceServerClient, inputs: list[Any], parameters: dict[str, Any], memory: Any) -> Any:
    """Ask for the whole answer in one response of a stream: a second one would overwrite the first."""
    arrived: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    client.async_stream_infer("tensorrt_llm", inputs, outputs=outputs(), parameters=parameters)
    result, error = arrived.get(timeout=60)
    assert error is None, error
    assert result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    return tokens_in(result, memory)


def patiently(call: Any, *arguments: Any) -> None:
    """Call again while the server still counts a region as in use, which it may just after a final response."""
    while True:
        try:
            call(*arguments)
            return
        except InferenceServerException as error:
            if "currently in use" not in error.message():
                raise
        time.sleep(0.005)


def main() -> None:
    address, lora = asked(__doc__)
    prompt = SharedMemory(create=True, size=4096)
    answer = SharedMemory(create=True, size=4096)
    answers: dict[str, Any] = {}
    with triton.InferenceServerClient(address) as client:
        client.unregister_system_shared_memory()  # as NVIDIA's examples begin
        client.unregister_cuda_shared_memory()
        client.register_system_shared_memory("program_prompt", f"/{prompt.name}", prompt.size)
        client.register_system_shared_memory("program_answer", f"/{answer.name}", answer.size)
        regions = client.get_system_shared_memory_status(as_json=True)["regions"]
        decoupled = client.get_model_config("tensorrt_llm").config.model_transaction_policy.decoupled
        for number, ids in enumerate(PROMPTS):
            inputs = in_region(ids, False, prompt) + lora["inputs"]
            if decoupled:
                found = streamed(client, inputs, lora["parameters"], answer)
            else:
                result = client.infer("tensorrt_llm", inputs, outputs=outputs(), parameters=lora["parameters"])
                found = tokens_in(result, answer)
            answers[f"tokens-{number}"] = found
        patiently(client.unregister_system_shared_memory, "program_prompt")
        patiently(client.unregister_system_shared_memory)
        answers["regions"] = [sorted(regions), client.get_system_shared_memory_status(as_json=True)]
    for memory in (prompt, answer):
        memory.close()
        memory.unlink()
    print(json.dumps(answers, sort_keys=True))


if __name__ == "__main__":
    main()
