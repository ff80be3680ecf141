"""What a program asks for: an adapter by name, by its weights as without a sidecar, or the base model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

TASK_ID = 1
"""The id that a program without a sidecar has chosen for its adapter."""


def tensor(name: str, array: np.ndarray[Any, Any]) -> triton.InferInput:
    held = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    held.set_data_from_numpy(array)
    return held


def asked(doc: str | None) -> tuple[str, dict[str, Any]]:
    """Return the server's address, and what each request needs beside its tensors: parameters, or three more inputs.

    The adapter is a name, or the folder where `hf_lora_convert.py` or `sidecar adapters convert` has written it.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("address")
    parser.add_argument("adapter", nargs="?")
    arguments = parser.parse_args()
    if arguments.adapter is None:
        return arguments.address, {"parameters": {}, "inputs": []}
    if "/" not in arguments.adapter:
        return arguments.address, {"parameters": {"lora_name": arguments.adapter}, "inputs": []}
    folder = Path(arguments.adapter)
    weights, config = (np.load(folder / f"model.lora_{part}.npy") for part in ("weights", "config"))
    task_id = np.array([[TASK_ID]], np.uint64)
    inputs = [tensor("lora_task_id", task_id), tensor("lora_weights", weights), tensor("lora_config", config)]
    return arguments.address, {"parameters": {}, "inputs": inputs}


PROMPTS = ([256, 1, 2], [256, 72, 101, 108, 108, 111], [256, *range(40)])
TEXTS = ("hello", "The quick brown fox", "ü")


def token_inputs(ids: list[int], streaming: bool, tokens: int = 12) -> list[triton.InferInput]:
    """Return the inputs of the core model."""
    return [
        tensor("input_ids", np.array([ids], np.int32)),
        tensor("input_lengths", np.array([[len(ids)]], np.int32)),
        tensor("request_output_len", np.array([[tokens]], np.int32)),
        tensor("streaming", np.array([[streaming]])),
        tensor("exclude_input_in_output", np.array([[True]])),
        tensor("runtime_top_k", np.array([[1]], np.int32)),
    ]


def text_inputs(text: str, streaming: bool, tokens: int = 12) -> list[triton.InferInput]:
    """Return the inputs of the ensemble."""
    return [
        tensor("text_input", np.array([[text.encode()]], object)),
        tensor("max_tokens", np.array([[tokens]], np.int32)),
        tensor("stream", np.array([[streaming]])),
        tensor("exclude_input_in_output", np.array([[True]])),
        tensor("top_k", np.array([[1]], np.int32)),
    ]


def answer_of(result: triton.InferResult) -> list[Any]:
    """Return a response's tokens, or its text."""
    ids = result.as_numpy("output_ids")
    if ids is not None:
        return list(ids.reshape(-1).tolist())
    return [text.decode(errors="replace") for text in result.as_numpy("text_output").reshape(-1)]
