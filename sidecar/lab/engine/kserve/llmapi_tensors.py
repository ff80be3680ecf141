"""The tensors of the LLM-API model, as its config.pbtxt has them: name, type, dims. None has a batch dimension."""

from __future__ import annotations

from collections.abc import Iterator


def _all(datatype: str, dims: tuple[int, ...], *names: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((name, datatype, dims) for name in names)


_SAMPLING = "sampling_param_"
LLMAPI_INPUTS = (
    ("text_input", "BYTES", (-1,)),
    ("image_url", "BYTES", (-1,)),
    ("streaming", "BOOL", (1,)),
    *_all("INT32", (1,), *(f"{_SAMPLING}{name}" for name in ("best_of", "top_k", "max_tokens"))),
    *_all("FP32", (1,), *(f"{_SAMPLING}{name}" for name in ("temperature", "top_p"))),
    *_all("FP32", (1,), *(f"{_SAMPLING}{name}" for name in ("frequency_penalty", "presence_penalty"))),
    (f"{_SAMPLING}stop", "BYTES", (-1,)),
    (f"{_SAMPLING}seed", "UINT64", (1,)),
    *_all("BOOL", (1,), *(f"{_SAMPLING}{name}" for name in ("exclude_input_from_output", "return_perf_metrics"))),
    *_all("BOOL", (1,), "return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop"),
    ("lora_id", "UINT64", (1,)),
    *_all("BYTES", (1,), "lora_name", "lora_path", "lora_ckpt_source"),
)
LLMAPI_OUTPUTS = (
    *_all("BYTES", (-1,), "text_output", "finish_reason", "stop_reason"),
    ("cumulative_logprob", "FP32", (-1,)),
    *_all("INT32", (-1,), "kv_cache_reused_block", "kv_cache_missed_block"),
    *_all("INT32", (-1,), "kv_cache_alloc_new_blocks", "kv_cache_alloc_total_blocks"),
    ("kv_cache_hit_rate", "FP32", (-1,)),
    *_all("INT64", (1,), "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
    ("acceptance_rate", "FP32", (1,)),
    *_all("INT32", (1,), "total_accepted_draft_tokens", "total_draft_tokens"),
)
