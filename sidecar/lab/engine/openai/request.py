"""From a request's fields to sequences: vLLM's checks, in its order and with its texts.

Some checks run so late that a stream has begun: `EngineRequest.fault` holds their result, and a stream sends it as an
event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.lab.engine.http.text import Stops
from sidecar.lab.engine.openai.chat import LONGEST_TOKEN, plain_tokens, prompt_of
from sidecar.lab.engine.openai.errors import ApiError, invalid
from sidecar.lab.engine.openai.fields import ChatFields, CompletionFields, Sampling
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tokens import ByteTokenizer


@dataclass(frozen=True)
class EngineRequest:
    """What one HTTP request asks of the engine: prompts, `n` answers to each, and their ends; or the late fault."""

    prompts: tuple[list[int], ...]
    max_tokens: tuple[int, ...]
    n: int
    stops: Stops
    bias: dict[int, float]
    fault: ApiError | None = None


class TooLong(ApiError):
    """A prompt of `count` tokens, or more, that has no room in the `longest` sequence."""

    def __init__(self, text: str, count: int, longest: int) -> None:
        super().__init__(f"{text} (parameter=input_tokens, value={count})", param="input_tokens")
        self.count = count
        self.longest = longest


def check_completion_body(content: object) -> None:
    """Raise ApiError for what is refused before the fields are read."""
    if not isinstance(content, dict):
        return
    prompt = content.get("prompt")
    if (prompt is None or prompt == "") and not content.get("prompt_embeds"):
        raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    check_stream_options(content)


def check_stream_options(content: object) -> None:
    """Raise ApiError for stream options without a stream."""
    if isinstance(content, dict) and content.get("stream_options") and not content.get("stream"):
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")


def completion_of(fields: CompletionFields, spec: EngineSpec) -> EngineRequest:
    """Return the engine request of a completion. Raises ApiError."""
    _refuse(fields, {"echo": fields.echo, "logprobs": fields.logprobs is not None})
    if fields.suffix:
        raise ApiError("suffix is only supported for models with FIM completion rendering", param="suffix")
    prompts = _prompts(fields, spec)
    asked = 16 if fields.max_tokens is None else fields.max_tokens
    return _asked(fields, prompts, asked, fields.n, spec)


def chat_of(fields: ChatFields, spec: EngineSpec) -> EngineRequest:
    """Return the engine request of a chat completion. Raises ApiError."""
    _refuse(fields, {"echo": fields.echo, "logprobs": bool(fields.logprobs)})
    if fields.tools and fields.tool_choice != "none":
        raise ApiError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
    prompt = prompt_of(fields.messages, fields.add_generation_prompt)
    _check_length(prompt, spec, is_text=True)
    wanted = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    return _asked(fields, [prompt], wanted, fields.n or 1, spec)


def _asked(
    fields: Sampling, prompts: Sequence[list[int]], wanted: int | None, n: int, spec: EngineSpec
) -> EngineRequest:
    rooms = [spec.longest_sequence_tokens - len(prompt) for prompt in prompts]
    limits = tuple(room if wanted is None else min(room, wanted) for room in rooms)
    for limit in limits:
        _check_sampling(fields, limit, n)
    stops, bias = fields.stops, _bias(fields)
    fault = _unknown_tokens(prompts, {"logit_bias": list(bias), "stop_token_ids": list(stops.token_ids)}, spec)
    return EngineRequest(tuple(prompts), limits, n, stops, bias, fault)


def _bias(fields: Sampling) -> dict[int, float]:
    given = fields.logit_bias or {}
    strange = [token for token in given if not token.lstrip("+-").isdecimal()]
    if strange:
        text = f"logit_bias contains key(s) that cannot be converted to integer token IDs: {strange}"
        raise invalid(text, "logit_bias", strange)
    return {int(token): size for token, size in given.items()}


def _unknown_tokens(prompts: Sequence[list[int]], named: dict[str, list[int]], spec: EngineSpec) -> ApiError | None:
    vocabulary = spec.shape.vocab
    for prompt in prompts:
        if not prompt:
            return ApiError("The decoder prompt cannot be empty")
        if max(prompt) >= vocabulary:
            return ApiError(f"Token id {max(prompt)} is out of vocabulary")
    for name, tokens in named.items():
        strange = [token for token in tokens if not 0 <= token < vocabulary]
        if strange:
            text = f"token_id(s) {strange} in {name} contain out-of-vocab token ids. Vocabulary size: {vocabulary}"
            return invalid(text, name, strange)
    return None


def _prompts(fields: CompletionFields, spec: EngineSpec) -> list[list[int]]:
    prompt = fields.prompt
    if isinstance(prompt, str):
        return [_tokens(prompt, fields.add_special_tokens, spec)]
    if not prompt:
        raise ApiError("You must pass at least one prompt")
    if isinstance(prompt[0], int):
        return [_fitting([token for token in prompt if isinstance(token, int)], spec)]
    return [
        _tokens(each, fields.add_special_tokens, spec) if isinstance(each, str) else _fitting(each, spec)
        for each in prompt
        if not isinstance(each, int)
    ]


def _tokens(text: str, with_start: bool, spec: EngineSpec) -> list[int]:
    longest = spec.longest_sequence_tokens
    if len(text) > longest * LONGEST_TOKEN:
        raise invalid(
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {len(text)} "
            f"characters (more than {longest * LONGEST_TOKEN} characters, which is the upper bound for {longest} input "
            "tokens). Please reduce the length of the input prompt.",
            "input_text",
            len(text),
        )
    tokens = ByteTokenizer().encode(text) if with_start else plain_tokens(text)
    _check_length(tokens, spec, is_text=True)
    return tokens


def _fitting(tokens: list[int], spec: EngineSpec) -> list[int]:
    _check_length(tokens, spec, is_text=False)
    return tokens


def _check_length(tokens: Sequence[int], spec: EngineSpec, is_text: bool) -> None:
    """Check the length. A text is read no further than one token past the limit, so its true length is unknown."""
    longest = spec.longest_sequence_tokens
    count = min(len(tokens), longest + 1) if is_text else len(tokens)
    if count > longest:
        least = "at least " if count == longest + 1 else ""
        raise TooLong(
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {least}{count} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
            "input prompt.",
            count,
            longest,
        )


def _refuse(fields: Sampling, given: dict[str, bool | None]) -> None:
    """Refuse what this engine cannot do if an answer without it would not show that."""
    given = given | {
        "prompt_logprobs": fields.prompt_logprobs is not None,
        "use_beam_search": fields.use_beam_search,
        "structured_outputs": fields.structured_outputs is not None,
        "response_format": (fields.response_format or {}).get("type", "text") != "text",
    }
    for name, is_given in given.items():
        if is_given:
            raise ApiError(f"{name} is not available from the emulated engine", param=name)


def _check_sampling(fields: Sampling, max_tokens: int, n: int) -> None:
    temperature = 1.0 if fields.temperature is None else fields.temperature
    if n < 1:
        raise ApiError(f"n must be at least 1, got {n}.")
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(fields, name) or 0.0
        if not -2.0 <= penalty <= 2.0:
            raise ApiError(f"{name} must be in [-2, 2], got {penalty}.")
    if fields.repetition_penalty is not None and fields.repetition_penalty <= 0:
        raise ApiError(f"repetition_penalty must be greater than zero, got {fields.repetition_penalty}.")
    _check_temperature(temperature)
    if fields.top_p is not None and not 0 < fields.top_p <= 1:
        raise invalid(f"top_p must be in (0, 1], got {fields.top_p}.", "top_p", fields.top_p)
    if fields.top_k is not None and fields.top_k < -1:
        raise ApiError(f"top_k must be 0 (disable), or at least 1, got {fields.top_k}.")
    if fields.min_p is not None and not 0 <= fields.min_p <= 1:
        raise ApiError(f"min_p must be in [0, 1], got {fields.min_p}.")
    if max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    if fields.min_tokens < 0:
        raise ApiError(f"min_tokens must be greater than or equal to 0, got {fields.min_tokens}.")
    if fields.min_tokens > max_tokens:
        raise ApiError(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {fields.min_tokens}.")
    if "" in fields.stops.strings:
        raise ApiError("stop cannot contain an empty string.")
    if temperature == 0 and n > 1 and not fields.greedy_n:
        raise ApiError(f"n must be 1 when using greedy sampling, got {n}.")


def _check_temperature(temperature: float) -> None:
    text = ""
    if not math.isfinite(temperature):
        text = f"temperature must be a finite number, got {temperature}."
    elif temperature < 0:
        text = f"temperature must be non-negative, got {temperature}."
    elif temperature > 2:
        text = f"temperature must be in [0, 2], got {temperature}."
    if text:
        raise invalid(text, "temperature", temperature)
