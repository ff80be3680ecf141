"""Write a completion or a chat for engines that take a text and return one.

A member for which they have no input is refused by its name: an answer without it would not be what was asked for.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.backends import registry
from sidecar.backends.api import Form
from sidecar.backends.kind import Ask, write_for
from sidecar.backends.openai.asking import remedy
from sidecar.fronts.generate.forms import INT32_MAX
from sidecar.fronts.openai.chat_templates import ChatTemplate, plain_messages
from sidecar.fronts.openai.request import BEST_OF, N, OpenAiRequest, Unfit, whole_number

READ = frozenset(
    {
        "model", "prompt", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
        "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "ignore_eos",
        "logprobs", "min_tokens", "chat_template_kwargs", "add_generation_prompt",
    }
)  # fmt: skip
ABOUT_THE_CALLER = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    }
)  # fmt: skip
"""Members that do not change an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
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
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
}
"""Members that ask for nothing if they have one of these values, or null."""
LOG_PROBS = "logprobs"
PENALTIES = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class TextRequest:
    """A request as text, by the kinds of model that take it. Their answers are made from text.

    `why_not` says for the other kinds which input they lack. `prompt` is the text.
    """

    forms: dict[str, Form]
    why_not: dict[str, str]
    max_tokens: int
    stop: tuple[str, ...]
    prompt: str = ""
    logprobs: bool = False


def text_request(
    asked: OpenAiRequest,
    template: ChatTemplate | None,
    tokens_assumed: int,
    streams: Mapping[str, bool],
    limited: int | None = None,
) -> TextRequest:
    """Write a request for the kinds of model in `streams`, which says whether each is to stream.

    `tokens_assumed` bounds the answer if the client does not, and so does `limited` where it is smaller. Raises Unfit.
    """
    models = {registry.model_kind(name): does_stream for name, does_stream in streams.items()}
    where = f"the engines behind this model ({', '.join(dict.fromkeys(model.title for model in models))})"
    values = asked.body.values
    _check_members(values if asked.choice is None else {**values, N: 1, BEST_OF: 1}, where)
    max_tokens = tokens_assumed if asked.max_tokens is None else asked.max_tokens
    if limited is not None:
        max_tokens = min(max_tokens, limited)
    if not 0 < max_tokens <= INT32_MAX:
        raise Unfit("max_tokens", f"max_tokens must be 1 to {INT32_MAX} for {where}")
    min_tokens = _whole(values, "min_tokens", 0)
    if min_tokens is not None and min_tokens > max_tokens:
        raise Unfit("min_tokens", f"min_tokens is {min_tokens} and the answer has {max_tokens} tokens at most")
    stop, logprobs = _stop_words(values), _log_probs(asked, where)
    ask = Ask(
        text=_text(asked, template, where),
        max_tokens=max_tokens,
        model=asked.model,
        stop_words=stop,
        ignore_eos=values.get("ignore_eos") is True,
        min_tokens=min_tokens or None,
        logprobs=logprobs,
        **_sampling(values, asked.choice or 0),
    )
    forms, why_not = write_for(ask, models)
    for name in [name for name in forms if logprobs and not streams[name]]:
        del forms[name]
        why_not[name] = f"{where} answer at once, so that no token is told from the next; leave logprobs out"
    return TextRequest(forms, why_not, max_tokens, stop, ask.text or "", logprobs)


def _check_members(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if value is None or name in READ or name in ABOUT_THE_CALLER:
            continue
        if name not in NEUTRAL:
            known = (*READ, *ABOUT_THE_CALLER, *NEUTRAL)
            raise Unfit(name[:80], f'{where} have no "{name[:80]}"; {remedy(name, sorted(known), "leave it out")}')
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            raise Unfit(name, f'{where} cannot do "{name}": {_shown(value)}; leave it out, or serve the model by vLLM')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _text(asked: OpenAiRequest, template: ChatTemplate | None, where: str) -> str:
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
            raise Unfit("prompt", f"{where} take texts and no token ids; send the prompt as a string")
        text = prompt
    if not text:
        raise Unfit("messages" if asked.is_chat else "prompt", "the prompt is empty")
    return text.encode(errors="replace").decode()


def _log_probs(asked: OpenAiRequest, where: str) -> bool:
    """Return True if each token's probability is asked for. Raises Unfit for those of tokens that were not chosen."""
    value = asked.body.values.get(LOG_PROBS)
    if value is None or value is False:
        return False
    if value is True if asked.is_chat else value == 0:
        return True
    least = '"logprobs": true in a chat, 0 in a completion'
    raise Unfit(LOG_PROBS, f"{where} tell the probability of the tokens that they chose and of no others; send {least}")


def _stop_words(values: dict[str, Any]) -> tuple[str, ...]:
    stop = values.get("stop") or []
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise Unfit("stop", '"stop" must be a text or a list of texts')
    return tuple(words)


def _sampling(values: dict[str, Any], choice: int) -> dict[str, Any]:
    """Return the sampling parameters; each choice of several is drawn by a seed of its own.

    TensorRT-LLM is greedy until it is given a number of candidates, whatever the temperature, and draws the same random
    numbers for every request until it is given a seed. Clients of this API expect neither.
    """
    temperature = _number(values, "temperature", 0.0)
    sampling: dict[str, Any] = {"repetition_penalty": _number(values, "repetition_penalty", 0.0)}
    sampling |= {name: _number(values, name, -2.0) for name in PENALTIES if values.get(name)}
    if temperature == 0:
        return sampling | {"top_k": 1}
    top_k, top_p, seed = _whole(values, "top_k", -1), _number(values, "top_p", 0.0), _whole(values, "seed", 0)
    if temperature is not None:
        if top_p is None and (top_k is None or top_k <= 0):
            top_p = 1.0
        if seed is None:
            seed = secrets.randbits(63)
    if seed is not None:
        seed = (seed + choice) % 2**64
    if top_k is not None and top_k <= 0:
        top_k = None
    return sampling | {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


def _number(values: dict[str, Any], name: str, least: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9 or math.isnan(value):
        raise Unfit(name, f'"{name}" must be a number from {least:g}')
    return float(value)


def _whole(values: dict[str, Any], name: str, least: int) -> int | None:
    value = whole_number(values.get(name))
    most = INT32_MAX if name == "top_k" else 2**64 - 1
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise Unfit(name, f'"{name}" must be a whole number from {least} to {most}')
    return value
