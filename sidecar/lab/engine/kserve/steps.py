"""The steps of `ensemble`: what each model calls the others' tensors, and how Triton is told to pass them on.

Source: `triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tritonclient.grpc import model_config_pb2

PREPROCESSING, POSTPROCESSING = "preprocessing", "postprocessing"

CORE_INPUTS = {
    "num_return_sequences": "num_return_sequences",
    "exclude_input_in_output": "exclude_input_in_output",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "temperature": "temperature",
    "length_penalty": "len_penalty",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
    "min_length": "min_length",
    "beam_width": "beam_width",
    "seed": "seed",
    "random_seed": "random_seed",
    "return_log_probs": "return_log_probs",
    "return_context_logits": "return_context_logits",
    "return_generation_logits": "return_generation_logits",
    "return_perf_metrics": "return_perf_metrics",
    "return_num_input_tokens": "return_num_input_tokens",
    "return_num_output_tokens": "return_num_output_tokens",
    "stream": "streaming",
    "lora_task_id": "lora_task_id",
    "lora_weights": "lora_weights",
    "lora_config": "lora_config",
}
"""What the core model calls the inputs of the text models that go to it as they are."""
STEPS = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
}
"""The core model's inputs that the preprocessing makes."""
QUESTIONS = {
    "text_input": "QUERY",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "end_id": "END_ID",
    "pad_id": "PAD_ID",
}
"""What the preprocessing calls the inputs of the text models that it takes."""
ANSWERS = {"output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH"}
"""What the postprocessing calls the outputs of the core model that it takes."""


def scheduling(core: str, inputs: Iterable[str], outputs: Iterable[str]) -> Any:
    """Return the steps of an ensemble over a core model, with these inputs and outputs of its own.

    A tensor that only the steps know has an underscore before its name.
    """
    steps = model_config_pb2.ModelEnsembling()
    passed = {theirs: ours for ours, theirs in CORE_INPUTS.items() if ours in set(inputs)}
    found = {name: name for name in outputs if name != "text_output"}
    _add(
        steps, PREPROCESSING, {theirs: ours for ours, theirs in QUESTIONS.items()}, {name: f"_{name}" for name in STEPS}
    )
    _add(
        steps,
        core,
        {theirs: f"_{name}" for name, theirs in STEPS.items()} | passed,
        {name: f"_{name}" for name in ANSWERS} | found,
    )
    _add(steps, POSTPROCESSING, {theirs: f"_{ours}" for ours, theirs in ANSWERS.items()}, {"OUTPUT": "text_output"})
    return steps


def _add(steps: Any, model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    step = steps.step.add(model_name=model, model_version=-1)
    step.input_map.update(inputs)
    step.output_map.update(outputs)
