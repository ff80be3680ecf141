"""Estimate what an engine has made of an answer that comes all at once and is cut before: nothing tells of its tokens.

Its client, its deadline or an operator has ended it, and not the engine, which has worked until then. So it has made as
many tokens as it makes in that time, by the answers that it has given whole, and at most those that were asked for. If
it has given none yet, it is charged all of these: to leave early must not make an answer cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic_ns

from sidecar.backends.api import Ticket
from sidecar.core.effects import Settle
from sidecar.core.state import State
from sidecar.errors import Reason
from sidecar.shell.requests import COUNT_MAX

CUT = frozenset({Reason.CANCELLED, Reason.DEADLINE_EXCEEDED})
"""The reasons of those who end a request that its engine would have answered."""
KEPT = 0.99
"""What an answer weighs for an engine's pace with each later one."""
TOKENS_FEWEST = 16
"""The shortest answer of which the time says something of tokens, and not of the prompt alone."""


class Made:
    """What engines make of answers that come all at once. `state` returns the core's."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state
        self._sums: dict[str, tuple[float, float]] = {}
        """By backend, of answers' tokens: the sum of their products with the time in ns, and of their squares.

        Long answers count most by these: the time of short ones is that of their prompts.
        """

    def learn(self, ticket: Ticket | None, ending: Settle) -> None:
        """Learn from an answer that has ended. Of a stream the time may be its client's, who reads it as it likes."""
        if ticket is None or not ticket.is_whole or ending.reason is not None or ending.is_estimated:
            return
        tokens = ending.output_tokens / max(1, ticket.facts.sequences)
        if tokens >= TOKENS_FEWEST:
            products, squares = self._sums.get(ending.backend, (0.0, 0.0))
            took_ns = monotonic_ns() - ticket.dispatched_ns
            self._sums[ending.backend] = KEPT * products + took_ns * tokens, KEPT * squares + tokens**2

    def counted(self, ending: Settle, ticket: Ticket, runs: bool) -> Settle:
        """Return an early ending with the tokens that have come, or that the engine where it still `runs` has made."""
        is_over = ticket.came is not None and ticket.came.final
        tokens, is_estimated = ticket.tokens, ending.is_estimated
        if runs and ending.reason in CUT and ticket.is_whole and not is_over:
            tokens, is_estimated = max(tokens, self._estimate(ticket, ending.backend)), True
        if tokens <= ending.output_tokens:
            return ending
        return replace(ending, output_tokens=tokens, is_estimated=is_estimated)

    def _estimate(self, ticket: Ticket, backend: str) -> int:
        facts, state = ticket.facts, self._state()
        most: int = min(facts.output_tokens_max, (ticket.length_max or COUNT_MAX) * facts.sequences)
        products, squares = self._sums.get(backend, (0.0, 0.0))
        if not products:
            return most or state.config.output_tokens_assumed * facts.sequences
        made: int = round((monotonic_ns() - ticket.dispatched_ns) * squares / products) * facts.sequences
        return min(made, most if facts.has_length else COUNT_MAX)
