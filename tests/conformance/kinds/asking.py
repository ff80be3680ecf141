"""How a kind must put requests to its models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.backends.api import Form, HttpForm, Prompt
from sidecar.backends.kind import Ask, Asking, Kind, ModelKind, Native
from sidecar.backends.wire import ModelInferRequest

ASKS = {
    Prompt.TEXT: Ask(text="two plus two", max_tokens=3, model="a name"),
    Prompt.TOKENS: Ask(text=None, token_ids=(5, 6, 7), max_tokens=3, model="a name"),
}
OPTIONS: dict[str, Any] = {
    "stop_words": ("end",),
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "seed": 7,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "ignore_eos": True,
}


def answers_the_prompts_that_it_claims(kind: Kind) -> None:
    """A plain request with a prompt of `prompts` is written, and one with another prompt is refused in words."""
    for model, asking in _asked(kind):
        for prompt, ask in ASKS.items():
            reason = asking.why_not(ask)
            if prompt not in asking.prompts:
                assert reason, f"{model.name} does not claim {prompt.value}, and why_not has nothing against them"
                continue
            assert reason == "", f"{model.name} claims {prompt.value} and refuses them: {reason}"
            for streams in (False, True):
                _check_form(model, asking, ask, streams)


def passes_on_what_it_does_not_refuse(kind: Kind) -> None:
    """An option is refused by `why_not`, or makes another request: none is dropped in silence."""
    for model, asking in _asked(kind):
        for prompt in asking.prompts:
            plain = asking.write(ASKS[prompt], False)
            for option, value in OPTIONS.items():
                ask = replace(ASKS[prompt], **{option: value})
                if not asking.why_not(ask):
                    assert asking.write(ask, False) != plain, (
                        f"{model.name}, {prompt.value}: {option} is neither refused by why_not nor written"
                    )


def _asked(kind: Kind) -> list[tuple[ModelKind, Asking]]:
    return [(model, model.asking) for model in kind.models if model.asking is not None]


def _check_form(model: ModelKind, asking: Asking, ask: Ask, streams: bool) -> None:
    form: Form = asking.write(ask, streams)
    assert asking.write(ask, streams) == form, f"{model.name}: the same request is written in two ways"
    assert asking.write(replace(ask, max_tokens=4), streams) != form, f"{model.name}: max_tokens is not written"
    other = Ask(text="other words") if ask.text is not None else Ask(text=None, token_ids=(8, 9))
    assert asking.write(replace(other, max_tokens=3), streams) != form, f"{model.name}: the prompt is not written"
    if isinstance(form, HttpForm):
        assert model.native is not Native.KSERVE, f"{model.name} is native to KServe, and is asked by HTTP"
        assert form.streams == streams, f"{model.name}: streams is {form.streams} in the form, and was {streams}"
        assert form.model == ask.model, f"{model.name}: the form has not the client's name of the model"
        assert form.path.startswith("/"), f"{model.name}: the path {form.path} is none"
        return
    assert isinstance(form, bytes), f"{model.name}: write gives {type(form).__name__}; it must be bytes or an HttpForm"
    assert model.native is not Native.OPENAI, f"{model.name} is native to OpenAI's API, and is not asked by HTTP"
    if model.native is Native.KSERVE:
        assert ModelInferRequest.FromString(form).inputs, f"{model.name}: its request has no inputs"
