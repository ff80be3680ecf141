"""Bound the number of input tokens of a text. Only the engine has the tokenizer, so this is no count."""

from __future__ import annotations

from sidecar.core.state import State


def text_tokens_max(state: State, size_bytes: int) -> int:
    """Return the most input tokens that a text of this size can have and still be answered.

    A token has at least one byte, and an engine refuses a text with more tokens than it takes. So no text is refused
    here on an estimate.
    """
    limits = [backend.facts.input_tokens_max for backend in state.backends.values()]
    known = [limit for limit in limits if limit is not None]
    return min(size_bytes, max(known)) if known and len(known) == len(limits) else size_bytes
