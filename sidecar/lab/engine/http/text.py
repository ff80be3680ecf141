"""The text of one sequence: tokens to text as they come, and where a text ends.

A character appears when its last byte is there. While stop strings are possible, as many characters are held back as
the longest of them could still remove.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.lab.engine.tokens import BOS, EOS

_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Stops:
    """What ends an answer before its limit.

    With `end_id` None it continues past the end token. Below `min_tokens` nothing ends it. `keeps` leaves the stop
    string or token in the text.
    """

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    end_id: int | None = EOS
    min_tokens: int = 0
    keeps: bool = False

    def forbidden(self, generated: int) -> frozenset[int]:
        """Return the tokens that are forbidden so far."""
        if generated >= self.min_tokens:
            return frozenset()
        return frozenset(self.token_ids if self.end_id is None else (*self.token_ids, self.end_id))


class GeneratedText:
    """The tokens and the text of an answer. `stop_reason` is the stop string or token that ended it."""

    def __init__(self, stops: Stops) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stop_reason: str | int | None = None
        self._stops = stops
        self._pending = bytearray()
        self._sent = 0
        self._held_back = 0 if stops.keeps else max(map(len, stops.strings), default=1) - 1

    def add(self, token: int) -> bool:
        """Add the next token; return True if the answer ends with it."""
        stops = self._stops
        self.tokens.append(token)
        may_end = len(self.tokens) > stops.min_tokens
        if may_end and token == stops.end_id:
            return True
        stopped = may_end and token in stops.token_ids
        if stopped:
            self.stop_reason = token
        before = len(self.text)
        if not stopped or stops.keeps:
            self._read(token)
        return (may_end and self._found(len(self.text) - before)) or stopped

    def delta(self, final: bool) -> str:
        """Return the text that was not sent yet; all of it with the last token."""
        end = len(self.text) if final else max(self._sent, len(self.text) - self._held_back)
        start, self._sent = self._sent, end
        return self.text[start:end]

    def _read(self, token: int) -> None:
        if token >= BOS:
            return
        self._pending.append(token)
        text = self._pending.decode("utf-8", "replace")
        if not text.endswith(_UNFINISHED):
            self.text += text
            self._pending.clear()

    def _found(self, new: int) -> bool:
        """Look for stop strings that end in the newest characters; the one that completes first counts."""
        ends = []
        for place, string in enumerate(self._stops.strings):
            at = self.text.find(string, max(0, len(self.text) - new - len(string) + 1)) if new else -1
            if at >= 0:
                ends.append((at + len(string), place))
        if not ends:
            return False
        end, place = min(ends)
        self.stop_reason = self._stops.strings[place]
        self.text = self.text[: end if self._stops.keeps else end - len(self.stop_reason)]
        return True
