"""vLLM's conversations as prompts, and the emulator's tokenizer of bytes as vLLM shows it."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.engine.http.template import conversation
from sidecar.lab.engine.openai.errors import ApiError
from sidecar.lab.engine.openai.fields import Message
from sidecar.lab.engine.tokens import BOS, EOS, PAD, ByteTokenizer

SPECIAL_TOKENS = {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
LONGEST_TOKEN = max(map(len, SPECIAL_TOKENS.values()))
"""The most characters that one token stands for, by which vLLM bounds a text before it reads it."""


def prompt_of(messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Return the tokens of a conversation. Raises ApiError if it is empty or has parts other than text."""
    if not messages:
        raise ApiError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    return conversation(((message.role, _content_of(message)) for message in messages), add_generation_prompt)


def plain_tokens(text: str) -> list[int]:
    """Return the tokens of a text without the one that begins a prompt."""
    return ByteTokenizer().encode(text)[1:]


def token_strings(tokens: Sequence[int]) -> list[str]:
    """Return tokens as a byte-level vocabulary spells them: unprintable bytes appear as other letters."""
    return [SPECIAL_TOKENS.get(token) or _LETTERS[token] for token in tokens]


def full_text(tokens: Sequence[int]) -> str:
    """Return the text of tokens, with special ones spelt out."""
    parts, pending = [], bytearray()
    for token in tokens:
        if token in SPECIAL_TOKENS:
            parts += [pending.decode("utf-8", "replace"), SPECIAL_TOKENS[token]]
            pending.clear()
        elif token < len(_LETTERS):
            pending.append(token)
    return "".join([*parts, pending.decode("utf-8", "replace")])


def _content_of(message: Message) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) < len(content):
        raise ApiError("the emulated engine is not a multimodal model: it takes parts of type text only")
    return "\n".join(map(str, texts))


def _letters() -> list[str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


_LETTERS = _letters()
