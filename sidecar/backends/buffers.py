"""Limit the engines' answers that wait for slow clients: a bound for each, and one for all together.

An answer may hold as many bytes as are still free in all, up to its own bound. So when little is free, the answers
furthest behind stop first, one that keeps up never does, and the sum stays within its bound for any number of answers.
These are the dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998). Reserving each answer's bound in
advance would allow a sixteenth of the clients; bounding only the sum would let one client have everything.
"""

from __future__ import annotations

from sidecar.config.queue import ANSWER_BYTES_MAX, ANSWERS_BYTES_MAX

REPLY_BYTES = 256
"""Memory of one message beside its bytes: those of a token are few."""


class AnswerBuffers:
    """`held_bytes` counts the bytes of all answers; `each_bytes` and `all_bytes` are the bounds."""

    def __init__(self, each_bytes: int = ANSWER_BYTES_MAX, all_bytes: int = ANSWERS_BYTES_MAX) -> None:
        self.each_bytes = each_bytes
        self.all_bytes = all_bytes
        self.held_bytes = 0

    def allowance(self) -> int:
        """Return the number of bytes up to which an answer may grow at the moment."""
        return min(self.each_bytes, self.all_bytes - self.held_bytes)
