"""Render a chat as the text that its model was trained on, by the model's own Jinja2 template in a sandbox.

vLLM does that itself; engines that take text only need it done here. The environment is the one that model makers write
for: blocks are trimmed, loops have `break` and `continue`, and `raise_exception`, `strftime_now` and `tojson` exist. An
engine's tokenizer adds the token that begins a text itself, so the template's own is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sidecar.errors import Misused, Reason
from sidecar.files import DOCUMENT_BYTES_MAX, read_regular_or_piped
from sidecar.fronts.openai.request import Unfit

TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT = "default"
"""The template to take if a tokenizer has several."""


class _Rejected(Exception):
    """The template's own message about a chat that it does not take."""


class _Generation(Extension):
    """`{% generation %}` marks what the model itself says, for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 — Jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the special tokens that it may use. Equal if source and tokens are."""

    source: str
    path: str = field(compare=False)
    tokens: Mapping[str, str]
    compiled: jinja2.Template = field(compare=False, repr=False)

    def render(self, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> str:
        """Return the text. Raises Unfit, with the template's own message, if it does not take this chat."""
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = self.compiled.render(**{**self.tokens, **given, **more})
        except _Rejected as rejected:
            raise Unfit("messages", f"the model's chat template refuses it: {rejected}") from rejected
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise Unfit("messages", f"the model's chat template ({self.path}) cannot take it: {error}") from error
        begin = self.tokens.get("bos_token", "")
        return text.removeprefix(begin) if begin else text


def read_chat_template(path: Path) -> ChatTemplate:
    """Read a Jinja2 file, a tokenizer_config.json, or the folder of one.

    Special tokens come from the tokenizer's config, also for a template beside it. Raises Misused(CONFIG_INVALID).
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = _tokenizer_config(
            path if path.suffix == ".json" else folder / TOKENIZER_CONFIG, path.suffix == ".json"
        )
        own = folder / TEMPLATE_FILE if path.is_dir() or path.suffix == ".json" else path
        source = read_regular_or_piped(own, DOCUMENT_BYTES_MAX).decode() if own.is_file() else _template_in(config)
        if not source:
            path.stat()
    except FileNotFoundError as error:
        why = "no such file; relative paths count from the folder in which the process is started"
        raise Misused(Reason.CONFIG_INVALID, f"chat template {path}: {why}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise Misused(Reason.CONFIG_INVALID, f"chat template {path}: {error}") from error
    if not source:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"chat template {path}: there is none in it; name a Jinja2 file, or a {TOKENIZER_CONFIG} that has a "
            "chat_template",
        )
    tokens = {name: _token(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
    return compiled_template(source, str(path), tokens)


def compiled_template(source: str, path: str, tokens: Mapping[str, str]) -> ChatTemplate:
    """Compile a template read from `path`. Raises Misused(CONFIG_INVALID) if it is malformed."""
    return ChatTemplate(source, path, tokens, _compiled(source, path))


def _tokenizer_config(path: Path, required: bool) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    config = json.loads(read_regular_or_piped(path, DOCUMENT_BYTES_MAX))
    if not isinstance(config, dict):
        raise ValueError("it is not a tokenizer's config")
    return config


def _template_in(config: Mapping[str, Any]) -> str:
    """Return the (default) template of a tokenizer's config; "" if it has none."""
    template = config.get("chat_template", "")
    if isinstance(template, list):
        by_name = {one.get("name"): one.get("template", "") for one in template if isinstance(one, dict)}
        template = by_name.get(DEFAULT, "")
    return template if isinstance(template, str) else ""


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) and "content" in value else str(value)


def _compiled(source: str, path: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Misused(
            Reason.CONFIG_INVALID, f"chat template {path}: line {error.lineno}: {error.message}; it is not Jinja2"
        ) from error


def _to_json(value: Any, indent: int | None = None, **more: Any) -> str:
    """Write JSON without Jinja2's escapes, which are meant for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **more)


def _raise(message: str) -> None:
    raise _Rejected(message)


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages with their contents as text. Raises Unfit for a malformed one, or for other contents."""
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unfit("messages", f'{where} must be an object with a "role"')
        plain.append({**message, "content": _text_of(message.get("content"), where)})
    if not plain:
        raise Unfit("messages", '"messages" is empty; a chat needs one at least')
    return plain


def _text_of(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Unfit("messages", f"{where}: the engines behind this model take text only; leave out other contents")
    return "\n".join(text for text in texts if text is not None)
