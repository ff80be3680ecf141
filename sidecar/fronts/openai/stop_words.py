"""Where an answer ends by the client's word: the text up to the first stop word, which itself is not part of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Follows a text that comes in pieces. What may become a stop word is held back until it is known.

    Engines end there by themselves where their tokens allow it, and leave the stop word in the text.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._held = ""
        self.found = False

    def pass_on(self, piece: str, final: bool) -> str:
        """Return what may be told of the text so far; once a stop word is found, nothing more."""
        if not self._words or self.found:
            return "" if self.found else piece
        text = self._held + piece
        places = [place for word in self._words if (place := text.find(word)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = 0 if final else max(_begun(text, word) for word in self._words)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, word: str) -> int:
    """Return how many characters at the end of a text are the beginning of a word."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
