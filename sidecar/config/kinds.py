"""Keys of a backend that mean something to one kind of engine only: set for the other they would do nothing.

Plug-in kinds may take any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

TRITON, VLLM = "triton", "vllm"

OF_TRITON = {
    "model": "vLLM serves one model, and is asked what it calls it",
    "text_model": "vLLM takes text and tokens by one model",
    "models": "vLLM serves one model, and is asked what it calls it",
    "metrics": "vLLM's metrics are at its own url, under /metrics",
    "weights_transport": "vLLM reads adapters' files itself, from adapters_dir",
    "engine.config": "it names TensorRT-LLM's config.json; what vLLM was started with is said by engine.device_pages "
    "(--max-loras), engine.host_pages (--max-cpu-loras), engine.seats (--max-num-seqs) and engine.rank_max "
    "(--max-lora-rank)",
    "engine.modules": "nothing is packed for vLLM: what a page holds there is one adapter",
    "engine.rank_multiple": "nothing is packed for vLLM",
    "engine.tp": "nothing is packed for vLLM, which splits adapters itself",
    "engine.heads": "nothing is packed for vLLM; base_model.config says what adapters are checked against",
    "engine.kv_heads": "nothing is packed for vLLM; base_model.config says what adapters are checked against",
    "engine.head_size": "nothing is packed for vLLM; base_model.config says what adapters are checked against",
}
OF_VLLM = {
    "api_key_file": "Triton has no API keys; tls with a certificate of ours says who we are",
    "old_versions": "it is about versions of vLLM",
}


def out_of_place(kind: str, given: Collection[str]) -> Iterator[str]:
    """Yield for each key that is set and is of another kind of engine what is wrong with it.

    `given` are keys as they are written under a backend: `model`, `engine.config`.
    """
    others, owner = {VLLM: (OF_TRITON, "triton://"), TRITON: (OF_VLLM, "vllm://")}.get(kind, ({}, ""))
    for key, reason in others.items():
        if key in given:
            yield f"{key} is for {owner} backends only: {reason}; take it out"
