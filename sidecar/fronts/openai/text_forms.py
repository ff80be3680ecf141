"""A completion or a chat for engines that take a text and give one: TensorRT-LLM's models behind Triton.

What they have no word for is refused with the member's name: an answer without it is not the one that was asked for.
"""

from __future__ import annotations

import json
import math
import secrets
import struct
from dataclasses import dataclass
from typing import Any

from sidecar.fronts.generate.forms import INT32_MAX, Scalar, ensemble_form, llmapi_form
from sidecar.fronts.openai.asked import Asked, Unfit
from sidecar.fronts.openai.chat_templates import ChatTemplate, plain_messages
from sidecar.proto import gateway_pb2

WHERE = "the engines behind this model (TensorRT-LLM by Triton)"
READ = frozenset(
    {
        "model", "prompt", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
        "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "ignore_eos",
        "chat_template_kwargs", "add_generation_prompt",
    }
)  # fmt: skip
ABOUT_THE_CALLER = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    }
)  # fmt: skip
"""Members that change nothing in an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
}
"""Members that ask for nothing with these values, null among them."""
PENALTIES = ("presence_penalty", "frequency_penalty")
NO_END = Scalar("end_id", "", "INT32", struct.pack("<i", -1))


@dataclass(frozen=True)
class TextForms:
    """A request in the words of the ensemble and of the LLM-API model, whose answers are put together from text.

    `why_not_llmapi` says what the LLM-API model has no input for.
    """

    request: Any
    more: tuple[Scalar, ...]
    max_tokens: int
    stop: tuple[str, ...]
    why_not_llmapi: str

    def ensemble(self, streams: bool) -> bytes:
        return ensemble_form(self.request, streams, self.more)

    def llmapi(self, streams: bool) -> bytes:
        return llmapi_form(self.request, streams, self.more)

    def written(self, ensemble_streams: bool, llmapi_streams: bool) -> WrittenForms:
        """Write all of it now."""
        llmapi = b"" if self.why_not_llmapi else self.llmapi(llmapi_streams)
        return WrittenForms(self.ensemble(ensemble_streams), llmapi, self.max_tokens, self.stop, self.why_not_llmapi)


@dataclass(frozen=True)
class WrittenForms:
    """The same of a large request, written in another process, where it was said which models stream."""

    as_ensemble: bytes
    as_llmapi: bytes
    max_tokens: int
    stop: tuple[str, ...]
    why_not_llmapi: str

    def ensemble(self, streams: bool) -> bytes:
        return self.as_ensemble

    def llmapi(self, streams: bool) -> bytes:
        return self.as_llmapi


def text_forms(asked: Asked, template: ChatTemplate | None, tokens_assumed: int) -> TextForms:
    """Return the forms; `tokens_assumed` bounds an answer that its client does not. Raises Unfit with the reason."""
    values = asked.body.values
    _check_members(values)
    max_tokens = tokens_assumed if asked.max_tokens is None else asked.max_tokens
    if not 0 < max_tokens <= INT32_MAX:
        raise Unfit("max_tokens", f"max_tokens must be 1 to {INT32_MAX} for {WHERE}")
    stop = _stop_words(values)
    request = gateway_pb2.GenerateRequest(text=_text(asked, template), max_tokens=max_tokens, stop_words=stop)
    _add_sampling(request, values)
    more = [_penalty(name, values) for name in PENALTIES if values.get(name)]
    lacks = ["repetition_penalty"] if request.HasField("repetition_penalty") else []
    if values.get("ignore_eos") is True:
        more.append(NO_END)
        lacks.append("ignore_eos")
    why_not = f"TensorRT-LLM's LLM-API model has no {' and no '.join(lacks)}; leave it out" if lacks else ""
    return TextForms(request, tuple(more), max_tokens, tuple(stop), why_not)


def _check_members(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None or name in READ or name in ABOUT_THE_CALLER:
            continue
        if name not in NEUTRAL:
            raise Unfit(name[:80], f'{WHERE} have no "{name[:80]}"; leave it out')
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            raise Unfit(name, f'{WHERE} cannot do "{name}": {_shown(value)}; leave it out, or serve the model by vLLM')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _text(asked: Asked, template: ChatTemplate | None) -> str:
    values = asked.body.values
    if asked.is_chat:
        assert template is not None, "a chat without a template has no text"
        more = values.get("chat_template_kwargs")
        if more is not None and not isinstance(more, dict):
            raise Unfit("chat_template_kwargs", '"chat_template_kwargs" must be an object')
        options = {**(more or {}), "add_generation_prompt": values.get("add_generation_prompt") is not False}
        text = template.render(plain_messages(values["messages"]), options)
    else:
        prompt = values.get("prompt") if asked.part is None else json.loads(asked.body.raw[slice(*asked.part)])
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise Unfit("prompt", f"{WHERE} take texts and no token ids; send the prompt as a string")
        text = prompt
    if not text:
        raise Unfit("messages" if asked.is_chat else "prompt", "the prompt is empty")
    return text.encode(errors="replace").decode()


def _stop_words(values: dict[str, Any]) -> list[str]:
    stop = values.get("stop") or []
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise Unfit("stop", '"stop" must be a text or a list of texts')
    return [word.encode(errors="replace").decode() for word in words]


def _add_sampling(request: Any, values: dict[str, Any]) -> None:
    """Say how to choose tokens.

    TensorRT-LLM is greedy until it is told how many candidates to consider, whatever the temperature, and draws the
    same numbers for every request until it is given a seed; this API's clients expect neither.
    """
    temperature = _number(values, "temperature", 0.0)
    penalty = _number(values, "repetition_penalty", 0.0)
    if penalty is not None:
        request.repetition_penalty = penalty
    if temperature == 0:
        request.top_k = 1
        return
    top_k, top_p, seed = _whole(values, "top_k", -1), _number(values, "top_p", 0.0), _whole(values, "seed", 0)
    if temperature is not None:
        request.temperature = temperature
        if top_p is None and (top_k is None or top_k <= 0):
            top_p = 1.0
        if seed is None:
            seed = secrets.randbits(63)
    if top_k is not None and top_k > 0:
        request.top_k = top_k
    if top_p is not None:
        request.top_p = top_p
    if seed is not None:
        request.seed = seed


def _penalty(name: str, values: dict[str, Any]) -> Scalar:
    value = _number(values, name, -2.0)
    return Scalar(name, f"sampling_param_{name}", "FP32", struct.pack("<f", value))


def _number(values: dict[str, Any], name: str, least: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9 or math.isnan(value):
        raise Unfit(name, f'"{name}" must be a number from {least:g}')
    return float(value)


def _whole(values: dict[str, Any], name: str, least: int) -> int | None:
    value = values.get(name)
    most = INT32_MAX if name == "top_k" else 2**64 - 1
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise Unfit(name, f'"{name}" must be a whole number from {least} to {most}')
    return value
