"""Put requests to trtllm-serve: our own, read their answers, and say what of a client's it does not know.

The server refuses members that it does not know. Their names are those of `CompletionRequest` and
`ChatCompletionRequest` in `tensorrt_llm/serve/openai_protocol.py`, 1.2.1 and 1.3.
"""

from __future__ import annotations

from collections.abc import Collection

from sidecar.backends.api import HttpForm, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.openai.asking import CHAT, COMPLETIONS, completion, remedy
from sidecar.backends.openai.events import record_of

LORA = "lora_request"
_BOTH = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop",
        "stream", "stream_options", "temperature", "top_p", "user", "prompt_ignore_length", "best_of",
        "use_beam_search", "top_k", "top_p_min", "min_p", "repetition_penalty", "length_penalty", "early_stopping",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
        "spaces_between_special_tokens", "truncate_prompt_tokens", "echo", "add_special_tokens", "response_format",
    }
)  # fmt: skip
_KNOWN = {
    COMPLETIONS: _BOTH | {"prompt", "suffix", "return_context_logits", "detokenize"},
    CHAT: _BOTH
    | {
        "messages", "prompt_token_ids", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
        "reasoning_effort", "add_generation_prompt", "documents", "chat_template", "chat_template_kwargs",
        "mm_processor_kwargs",
    },
}  # fmt: skip
_LATER = frozenset({"thinking_token_budget", "priority", "cache_salt", "parallel_tool_calls"})
"""Members that newer servers know and older ones refuse themselves, by name."""
_REFUSED = {
    LORA: 'the sidecar names the adapter to the engine itself; name it in "model"',
    "disaggregated_params": "it says which server computes the prompt, which the sidecar does not do",
}


def why_not_client(path: str, members: Collection[str]) -> tuple[str, str]:
    """Return the first member of a client's body that the server does not take, and why; ("", "") if it takes all."""
    for name in members:
        if name in _REFUSED:
            return name, f'"{name}" cannot be sent: {_REFUSED[name]}'
        if name not in _KNOWN[path] and name not in _LATER:
            otherwise = "leave it out, or ask for an adapter that vLLM serves"
            return name, f'trtllm-serve has no "{name}"; {remedy(name, sorted(_KNOWN[path] | _LATER), otherwise)}'
    return "", ""


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, **({"detokenize": False} if ask.text is None else {}))


class _Reader:
    """Reads events of a stream, or a whole answer: text, or token ids where the server did not turn them into text."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        record = record_of(reply.raw)
        choices = record.get("choices") or []
        if not choices:
            return Piece()
        ids = choices[0].get("token_ids") or ()
        if not self._is_text:
            return Piece("", ids, len(ids))
        used = (record.get("usage") or {}).get("completion_tokens")
        return Piece(choices[0].get("text") or "", (), 1 if used is None else used)


ASKING = Asking(_write, lambda ask: "", _Reader)
