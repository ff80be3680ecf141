"""What the beginning of an engine's answer says: whether it goes to the client, and when enough of it has been seen.

Envoy may cut an answer anywhere. So what is not yet known to be an error is held, and an answer is let go only once a
whole event or message has come, by which its tokens are estimated.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from sidecar.backends.openai.events import END_OF_EVENT, ERROR, begins_only
from sidecar.backends.triton.framing import PREFIX, Compressed, Frames

EVENT_BYTES_MAX = 1 << 20
"""An answer of which so much has come is let go, whatever it is."""
ERROR_FIRST = 0x0A
"""The first byte of a stream's message that reports an error: that field comes first."""


class Verdict(Enum):
    """What becomes of a piece of an answer."""

    HOLD = "hold"
    """It may be the beginning of an error."""
    PASS = "pass"
    """It goes to the client, and the next one is looked at."""
    REPLACE = "replace"
    """It is for nobody: what the front says takes its place."""
    ENOUGH = "enough"
    """It goes to the client, and the rest need not be seen."""


class Opening(Protocol):
    def take(self, piece: bytes, ended: bool) -> Verdict:
        """Judge the next piece; `ended` if it is the last."""


class Events:
    """The opening of a stream of events."""

    def __init__(self) -> None:
        self._so_far = b""

    def take(self, piece: bytes, ended: bool) -> Verdict:
        self._so_far += piece
        if self._so_far.startswith(ERROR) or (ended and not piece):  # what ends before a token is no answer
            return Verdict.REPLACE
        if ERROR.startswith(self._so_far) and not ended:
            return Verdict.HOLD
        whole, end, _ = self._so_far.rpartition(END_OF_EVENT)
        has_token = bool(end) and not begins_only(whole + end)
        return Verdict.ENOUGH if has_token or len(self._so_far) > EVENT_BYTES_MAX else Verdict.PASS


class Messages:
    """The opening of a gRPC answer. What is no message, or compressed, is for nobody."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._begin = b""

    def take(self, piece: bytes, ended: bool) -> Verdict:
        self._begin += piece[: PREFIX.size + 1 - len(self._begin)]
        try:
            found = self._frames.take(piece)
        except Compressed:
            return Verdict.REPLACE
        if self._begin[PREFIX.size :] == bytes((ERROR_FIRST,)):
            return Verdict.REPLACE
        if found:
            return Verdict.ENOUGH
        return Verdict.HOLD if len(self._begin) <= PREFIX.size else Verdict.PASS
