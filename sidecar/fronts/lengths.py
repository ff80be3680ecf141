"""How many input tokens a text may be. Only the engine has the tokenizer, so this is a bound, not a count."""

from __future__ import annotations

from sidecar.core.state import State


def text_tokens_max(state: State, size_bytes: int) -> int:
    """Return the most tokens that a text can be and still be answered.

    A token is a byte or more, and a text of more tokens than the longest engine takes is refused by that engine,
    which alone can count them. So no text is turned away here on a guess.
    """
    limits = [backend.facts.input_tokens_max for backend in state.backends.values()]
    known = [limit for limit in limits if limit is not None]
    return min(size_bytes, max(known)) if known and len(known) == len(limits) else size_bytes
