"""How much of engines' answers may wait for clients that are slower: a bound for each, and one for all together.

An answer may hold as much as is still free for all, and no more than its own bound. So when little is free those
furthest behind are stopped first, one that keeps up never is, and the sum stays within its bound however many there
are: the dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998). To reserve each answer's bound in
advance would do the same for a sixteenth of the clients; to count none but the sum would let one client have it all.
"""

from __future__ import annotations

from sidecar.config.queue import ANSWER_BYTES_MAX, ANSWERS_BYTES_MAX

REPLY_BYTES = 256
"""What one message takes in memory beside its bytes: a token has few of those."""


class AnswerBuffers:
    """Counts what waits: `held_bytes` of all answers; `each_bytes` and `all_bytes` are the bounds."""

    def __init__(self, each_bytes: int = ANSWER_BYTES_MAX, all_bytes: int = ANSWERS_BYTES_MAX) -> None:
        self.each_bytes = each_bytes
        self.all_bytes = all_bytes
        self.held_bytes = 0

    def allowance(self) -> int:
        """Return the bytes up to which an answer is taken further at the moment."""
        return min(self.each_bytes, self.all_bytes - self.held_bytes)
