"""The chat template of the emulators' tokenizer of bytes.

As a tokenizer's configuration would have it:
`{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\\n{% endfor %}` and
`assistant: ` for the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.lab.engine.tokens import ByteTokenizer

ASSISTANT = "assistant"


def conversation(turns: Iterable[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
    """Return the tokens of a conversation, whose turns are pairs of role and text."""
    text = "".join(f"{role}: {said}\n" for role, said in turns)
    return ByteTokenizer().encode(text + (f"{ASSISTANT}: " if add_generation_prompt else ""))
