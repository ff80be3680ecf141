"""Make the table of what each kind of model can be asked, by asking the code that decides it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sidecar.backends import registry
from sidecar.backends.api import Prompt
from sidecar.backends.kind import Ask, ModelKind, Native
from sidecar.backends.openai.paths import CHAT, COMPLETIONS, ROWS, ApiPath
from sidecar.errors import Refused
from sidecar.fronts.openai.body import read_body
from sidecar.fronts.openai.candidates import why_no_path
from sidecar.fronts.openai.chat_templates import compiled_template
from sidecar.fronts.openai.request import choices_of, read_request
from sidecar.fronts.openai.text_forms import text_request

HEAD = """# Engines and protocols

What a request may ask for, by the kind of engine that answers it. A client names an adapter and does not choose an
engine: a request goes to those that can answer it, and is refused only if none can. In a pool of several kinds a "no"
therefore means that another engine answers.

* **as sent**: the engine gets the client's own request, with the adapter added.
* **as text**: the request is written as a text for an engine that takes nothing else, and its answer made from text.

"""
TITLES = {
    "triton": "Triton, compiled engine",
    "triton_llmapi": "Triton, LLM-API model",
    "vllm": "vLLM",
    "trtllm": "trtllm-serve",
    "sglang": "SGLang",
}
CHATS = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "look_up"}}
OPENAI: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("`/v1/completions`, text", COMPLETIONS, {"prompt": "hi"}),
    ("`/v1/completions`, token ids", COMPLETIONS, {"prompt": [1, 2]}),
    ("`/v1/chat/completions`", CHAT, CHATS),
    ("… streamed", CHAT, CHATS | {"stream": True}),
    ("… `logprobs`", CHAT, CHATS | {"logprobs": True}),
    ("… `n`", CHAT, CHATS | {"n": 2}),
    ("… `tools`", CHAT, CHATS | {"tools": [TOOL]}),
    ("… `response_format`", CHAT, CHATS | {"response_format": {"type": "json_object"}}),
    ("… `structured_outputs` (vLLM's)", CHAT, CHATS | {"structured_outputs": {"json": {}}}),
)
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


def page() -> str:
    """Return the page."""
    models = [model for model in registry.models().values() if model.name in TITLES]
    notes: dict[str, int] = {}

    def cell(model: ModelKind, answer: str, why: str) -> str:
        if not why:
            return answer
        return f"{answer} [{notes.setdefault(why, len(notes) + 1)}]"

    lines = [
        f"| | {' | '.join(TITLES[model.name] for model in models)} |",
        f"|---|{'---|' * len(models)}",
    ]
    for title, prompt in (("`Generate`, text", Prompt.TEXT), ("`Generate`, token ids", Prompt.TOKENS)):
        lines.append(f"| {title} | {' | '.join(cell(model, *_generate(model, prompt)) for model in models)} |")
    lines.append(f"| KServe tensors (tritonclient) | {' | '.join(cell(model, *_kserve(model)) for model in models)} |")
    for title, path, members in OPENAI:
        cells = " | ".join(cell(model, *_openai(model, path, members)) for model in models)
        lines.append(f"| {title} | {cells} |")
    lines += [
        f"| `{row.path}` | {' | '.join(cell(model, *_path(model, row)) for model in models)} |"
        for row in ROWS.values()
        if not row.as_text
    ]
    cells = " | ".join("the rest of its context [0]" if model.long_by_default else "16" for model in models)
    lines.append(f"| tokens of a completion without `max_tokens` | {cells} |")
    reasons = "".join(f"{number}. {why}\n" for why, number in notes.items())
    return f"{HEAD}{chr(10).join(lines)}\n\n{LENGTH}\n## Why not\n\n{reasons}"


LENGTH = """[0] Or as many as the tenant's or the class's default allows (`queue.tenant_max_tokens`,
`queue.classes.NAME.max_tokens`). The answer says it in the header `x-lora-max-tokens`. A chat without a length goes on
to the end of the context on vLLM and SGLang, too; an engine that takes text is asked for `queue.output_tokens_assumed`.

SGLang refuses a length that its context does not hold with status 400. The others cut the answer short. Then
`x-lora-max-tokens` says how long an answer to token ids can be. For a text, whose tokens are not counted yet, it says
how long the whole context is. KServe's responses have it as the parameter `lora_max_tokens`, gRPC's trailing metadata
as `lora-max-tokens`. The context is known where the engine tells it (vLLM, SGLang), or where its entry has it
(`engine.sequence_tokens_max`, or TensorRT-LLM's `config.json`).
"""


def _generate(model: ModelKind, prompt: Prompt) -> tuple[str, str]:
    asking = model.asking
    if asking is None or prompt not in asking.prompts:
        return "no", f"{TITLES[model.name]} takes no prompt of this form."
    ask = Ask("hi") if prompt is Prompt.TEXT else Ask(None, (1, 2))
    why = asking.why_not(ask)
    return ("no", why) if why else ("yes", "")


def _kserve(model: ModelKind) -> tuple[str, str]:
    if model.native is Native.KSERVE:
        return "as sent", ""
    return "no", "Its engines have an OpenAI API and take no tensors."


def _path(model: ModelKind, row: ApiPath) -> tuple[str, str]:
    if model.native is Native.OPENAI and row.path in model.paths:
        return "as sent", "" if row.generates else "If it was started to pool, with a model for this path."
    return "no", _sentence(why_no_path(model, row))


def _openai(model: ModelKind, path: str, members: Mapping[str, Any]) -> tuple[str, str]:
    asked = read_request(path, read_body(json.dumps({"model": "sql"} | dict(members)).encode()))
    if model.native is Native.OPENAI:
        _, why = model.why_not_client(path, asked.members)
        return ("no", _sentence(why)) if why else ("as sent", "")
    if model.asking is None or Prompt.TEXT not in model.asking.prompts:
        return "no", f"{TITLES[model.name]} takes no text."
    if asked.answers > 1:
        asked = choices_of(asked, 1, asked.answers, asked.answers * asked.size_bytes)[0]
    template = compiled_template(PLAIN, "the table's", {}) if path == CHAT else None
    try:
        why_not = text_request(asked, template, 16, {model.name: True}).why_not.get(model.name, "")
    except Refused as refused:
        return "no", _sentence(refused.message)
    if why_not:
        return "no", _sentence(why_not)
    needs = "The base model's `chat_template` must be configured." if path == CHAT else ""
    return "as text", needs


def _sentence(why: str) -> str:
    first = why[0] if why.startswith(TITLES["trtllm"]) else why[0].upper()
    return f"{first}{why[1:]}{'' if why.endswith('.') else '.'}"
