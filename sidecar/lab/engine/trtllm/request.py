"""From a request's fields to sequences: what is refused before an answer begins, and what the submit thread refuses.

The order matters to a client of a stream: what the submit thread refuses comes after the status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.lab.engine.http.template import conversation
from sidecar.lab.engine.http.text import Stops
from sidecar.lab.engine.messages import Request
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tokens import ByteTokenizer
from sidecar.lab.engine.trtllm.errors import RequestError
from sidecar.lab.engine.trtllm.fields import ChatFields, CompletionFields, Sampling
from sidecar.lab.engine.validation import Rejected, check_room

_BIAS_MAX = 100.0


@dataclass(frozen=True)
class Question:
    """What one HTTP request asks: prompts, `n` answers to each, and their ends. `echoes` precede the texts."""

    prompts: tuple[list[int], ...]
    max_tokens: int | None
    n: int
    stops: Stops
    bias: dict[int, float]
    echoes: tuple[str, ...]


def completion_of(fields: CompletionFields, spec: EngineSpec) -> Question:
    """Return what a completion asks. Raises RequestError."""
    _refuse(fields, {"logprobs": bool(fields.logprobs), "return_context_logits": fields.return_context_logits})
    prompts, texts = _prompts(fields)
    echoes = tuple(texts) if fields.echo else ("",) * len(prompts)
    return _asked(fields, prompts, fields.max_tokens, echoes, spec)


def chat_of(fields: ChatFields, spec: EngineSpec) -> Question:
    """Return what a chat asks. Raises RequestError."""
    _refuse(fields, {"logprobs": bool(fields.logprobs), "tools": bool(fields.tools), "echo": fields.echo})
    prompt = fields.prompt_token_ids
    if prompt is None:
        turns = ((message.role, message.text) for message in fields.messages)
        prompt = conversation(turns, fields.add_generation_prompt)
    return _asked(fields, [prompt], fields.max_completion_tokens, ("",), spec)


def check_submit(prompt: Sequence[int], max_tokens: int | None, spec: EngineSpec) -> int:
    """Return the tokens that an answer may have: what is asked, or all that the context leaves. Raises RequestError."""
    try:
        check_room(Request(0, len(prompt), 1), spec)
    except Rejected as error:
        raise RequestError(str(error)) from error
    if max_tokens is not None and max_tokens <= 0:
        raise RequestError(f"`max_tokens` ({max_tokens}) must be greater than 0")
    if not prompt or not 0 <= min(prompt) <= max(prompt) < spec.shape.vocab:
        raise RequestError("Token ID out of range")
    room = spec.longest_sequence_tokens - len(prompt)
    return room if max_tokens is None else min(max_tokens, room)


def _asked(
    fields: Sampling, prompts: Sequence[list[int]], max_tokens: int | None, echoes: tuple[str, ...], spec: EngineSpec
) -> Question:
    if fields.n < 1:
        raise RequestError(f"n must be at least 1, got {fields.n}")
    if fields.n > 1 and fields.temperature == 0:
        raise RequestError(
            "Greedy decoding in the LLM API does not allow multiple returns. Please set to best_of=1, got "
            f"best_of={fields.n}."
        )
    for prompt in prompts:
        if len(prompt) > spec.max_tokens_per_step:
            raise RequestError(
                f"The sum of prompt length ({len(prompt)}), query length (0) should not exceed max_num_tokens "
                f"({spec.max_tokens_per_step})"
            )
    return Question(tuple(prompts), max_tokens, fields.n, fields.stops, _bias(fields, spec), echoes)


def _prompts(fields: CompletionFields) -> tuple[list[list[int]], list[str]]:
    """Return the prompts as tokens, and as texts where they came as such."""
    prompt = fields.prompt
    given = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not given:
        raise RequestError("list index out of range")
    texts = [each if isinstance(each, str) else "" for each in given]
    return [_tokens(each, fields.add_special_tokens) for each in given], texts


def _tokens(prompt: object, with_start: bool) -> list[int]:
    if isinstance(prompt, str):
        return ByteTokenizer().encode(prompt)[0 if with_start else 1 :]
    assert isinstance(prompt, list)
    return prompt


def _bias(fields: Sampling, spec: EngineSpec) -> dict[int, float]:
    vocabulary = spec.shape.vocab
    bias = {}
    for key, size in (fields.logit_bias or {}).items():
        if not key.lstrip("+-").isdecimal():
            raise RequestError(f"Invalid logit_bias key '{key}': must be a valid integer token ID")
        if not 0 <= int(key) < vocabulary:
            raise RequestError(f"Token ID {int(key)} out of vocabulary range [0, {vocabulary})")
        if not -_BIAS_MAX <= size <= _BIAS_MAX:
            raise RequestError(f"logit_bias value for token ID {int(key)} must be in [-100, 100]")
        bias[int(key)] = size
    return bias


def _refuse(fields: Sampling, given: dict[str, bool]) -> None:
    """Refuse what this engine cannot do if an answer without it would not show that."""
    given = given | {
        "use_beam_search": fields.use_beam_search,
        "best_of": fields.best_of not in (None, fields.n),
        "truncate_prompt_tokens": fields.truncate_prompt_tokens is not None,
        "response_format": (fields.response_format or {}).get("type", "text") != "text",
        "disaggregated_params": fields.disaggregated_params is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise RequestError(f"{name} is not available from the emulated engine")
