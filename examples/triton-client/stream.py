"""Stream an answer from TensorRT-LLM behind Triton; the adapter is only named."""

import argparse
import queue
import sys

import numpy as np
import tritonclient.grpc as triton


def tensor(name, values, datatype):
    held = triton.InferInput(name, values.shape, datatype)
    held.set_data_from_numpy(values)
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("prompt")
    parser.add_argument("--server", default="127.0.0.1:9000")  # changed: was Triton's own, 127.0.0.1:8001
    arguments = parser.parse_args()
    inputs = [
        tensor("text_input", np.array([[arguments.prompt.encode()]], dtype=object), "BYTES"),
        tensor("max_tokens", np.array([[48]], dtype=np.int32), "INT32"),
        tensor("stream", np.array([[True]]), "BOOL"),
    ]
    answers = queue.Queue()
    with triton.InferenceServerClient(arguments.server) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            "ensemble",
            inputs,
            request_id="1",
            parameters={"lora_name": arguments.adapter},  # changed: was three lora_* tensors in `inputs`
        )
        final = False
        while not final:
            result, error = answers.get()
            if error is not None:
                print(error, file=sys.stderr)
                return 1
            final = result.get_response().parameters["triton_final_response"].bool_param
            text = result.as_numpy("text_output")
            if text is not None:
                print(b"".join(text.reshape(-1)).decode(), end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
