"""Estimate what an engine has made of an answer that comes all at once and is cut before that.

The engine has worked until then, at the pace of the answers that it has given. If there are none yet, the answer counts
as long as it may be: to leave early must not make it cheap.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic_ns

from sidecar.backends.api import Ticket
from sidecar.core.effects import Settle
from sidecar.errors import Reason

CUT = Reason.CANCELLED, Reason.DEADLINE_EXCEEDED
KEPT = 0.99
"""What an answer weighs for an engine's pace with each later one."""
TOKENS_FEWEST = 16
"""The shortest answer of which the time says something of tokens, and not of the prompt alone."""


class Made:
    """What engines make of answers that come all at once."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        """By backend, of answers: the sums of tokens times ns, and of tokens squared."""

    def learn(self, ticket: Ticket | None, ending: Settle) -> None:
        """Learn from an answer that has ended. Of a stream the time may be its client's, who reads it as it likes."""
        if ticket is None or not ticket.is_whole or ending.reason is not None or ending.is_estimated:
            return
        tokens = ending.output_tokens / max(1, ticket.facts.sequences)
        if tokens >= TOKENS_FEWEST:
            products, squares = self._sums.get(ending.backend, (0.0, 0.0))
            took_ns = monotonic_ns() - ticket.dispatched_ns
            self._sums[ending.backend] = KEPT * products + took_ns * tokens, KEPT * squares + tokens**2

    def counted(self, ending: Settle, ticket: Ticket, most: int) -> Settle:
        """Return an early ending with what has come or was made, `most` at most; that is 0 if no engine has it."""
        tokens, is_estimated, facts = ticket.tokens, ending.is_estimated, ticket.facts
        if most and ending.reason in CUT and ticket.is_whole and not (ticket.came is not None and ticket.came.final):
            took_ns, sums = monotonic_ns() - ticket.dispatched_ns, self._sums.get(ending.backend)
            made = most if sums is None else round(took_ns * sums[1] / sums[0]) * facts.sequences
            tokens, is_estimated = max(tokens, min(made, most) if facts.has_length else made), True
        has_more = tokens > ending.output_tokens
        return replace(ending, output_tokens=tokens, is_estimated=is_estimated) if has_more else ending
