"""What a program may ask before it infers: what server and models there are, and whether they are ready."""

from __future__ import annotations

import json
from typing import Any

import tritonclient.grpc as triton
from adapter import asked
from tritonclient.utils import InferenceServerException


def words(call: Any, *arguments: Any) -> Any:
    """Return an answer, or the code and text of the error."""
    try:
        return call(*arguments, as_json=True)
    except InferenceServerException as error:
        return [error.status(), error.message()]


def main() -> None:
    address, _ = asked(__doc__)
    with triton.InferenceServerClient(address) as client:
        told: dict[str, Any] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "server": client.get_server_metadata(as_json=True),
            "index": client.get_model_repository_index(as_json=True),
            "regions": client.get_system_shared_memory_status(as_json=True),
            "cuda": client.get_cuda_shared_memory_status(as_json=True),
        }
        for model, version in (
            ("tensorrt_llm", ""),
            ("tensorrt_llm", "1"),
            ("tensorrt_llm", "7"),
            ("ensemble", ""),
            ("nothing", ""),
        ):
            told[f"{model} {version}"] = {
                "ready": client.is_model_ready(model, version),
                "metadata": words(client.get_model_metadata, model, version),
                "config": words(client.get_model_config, model, version),
            }
        statistics = client.get_inference_statistics(as_json=True)["model_stats"]
        told["statistics"] = sorted(model["name"] for model in statistics)
    print(json.dumps(told, sort_keys=True))


if __name__ == "__main__":
    main()
