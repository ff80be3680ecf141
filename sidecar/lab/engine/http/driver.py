"""The driver of an engine whose requests are answered with texts: it ends them by the text, and not by a token only."""

from __future__ import annotations

import time

from sidecar.lab.engine.http.work import LENGTH, STOP, TextWork, Token
from sidecar.lab.engine.kserve.driver import Driver
from sidecar.lab.engine.messages import Iteration


class EngineDied(RuntimeError):
    """The engine has ended for good; the text says why."""


class TextDriver(Driver):
    """Runs one engine in real time. Its works are `TextWork`s, its progress is `Token`s."""

    def _deliver(self, iteration: Iteration, tokens: dict[int, int]) -> None:
        now_ns = time.monotonic_ns()
        works = {request_id: self._sequence(request_id) for request_id in tokens}
        ended = [request_id for request_id, token in tokens.items() if works[request_id].output.add(token)]
        endings = {ending.request_id: ending.reason for ending in self.engine.finish(iteration, now_ns, ended)}
        for request_id, token in tokens.items():
            work = works[request_id]
            work.first_token_ns = work.first_token_ns or now_ns
            work.last_token_ns = now_ns
            work.tokens.append(token)
            reason = _reason(request_id in ended, request_id in endings)
            if reason is not None:
                self._answered(work, reason)
                self._forget(work, "done")
            text = work.output.delta(reason is not None)
            work.sink(Token(work, token, reason is not None, None, text, reason, work.output.stop_reason))
        for request_id in endings.keys() - tokens.keys():
            self._ended_without_token(request_id)
        self._fail(self.engine.drain_failures())

    def end_all(self) -> None:
        """End every request as the end of the process does."""
        self._break("the server has ended")

    def _answered(self, work: TextWork, reason: str) -> None:
        """Take note of a request that has its last token."""

    def _ended_without_token(self, request_id: int) -> None:
        """Take note of a request that the engine ended in a step without a token of it."""

    def _sequence(self, request_id: int) -> TextWork:
        work = self._works[request_id]
        assert isinstance(work, TextWork)
        return work


def _reason(stopped: bool, over: bool) -> str | None:
    if stopped:
        return STOP
    return LENGTH if over else None
