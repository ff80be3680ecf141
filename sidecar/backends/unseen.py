"""Follow an answer of which the rest goes past this process: count its tokens by bytes, and tell the core its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from sidecar.backends.api import Ticket
from sidecar.backends.http_client import Ending, Sighting, Unseen
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault, Seen
from sidecar.core.events import Event, FirstToken, RunEnded, RunFailed

QUIET_S = 10.0
"""How long nothing is told of an answer that goes past us before its engine is asked."""
FADING, TOLD_FEWEST, UNSURE_MAX, SEVERAL_MAX = 0.99, 100, 0.04, 64.0
"""What a look leaves of all before it; the fewest tokens, as bytes tell of them, from which a scale is learned; the
largest share of the tokens that may be untold yet; and the largest scale.
"""


class Sightings:
    """What is told of an answer that goes past us, as it is told."""

    def __init__(self) -> None:
        self.goes_on = False
        self.told_s = monotonic()
        self.on_progress: Callable[[Sighting], None] | None = None
        self._came: asyncio.Queue[Sighting] = asyncio.Queue()

    def take(self, sighting: Sighting) -> None:
        self.told_s = monotonic()
        if sighting.ending is None and self.on_progress is not None:
            self.on_progress(sighting)  # one each second of each answer: no task is woken for it
        else:
            self._came.put_nowait(sighting)

    async def next(self) -> Sighting:
        return await self._came.get()


@dataclass
class Read:
    """What has been read of an answer: its bytes and tokens, and the bytes that a token takes, as in the last message.

    `tail_bytes` are those of what follows the last token.
    """

    tail_bytes: int
    size_bytes: int = 0
    tokens: int = 0
    token_bytes: int = 0

    def told(self, sighting: Sighting) -> float:
        """Return how many more tokens there are by the bytes that have gone past, if each takes as many."""
        left_bytes = sighting.body_bytes - self.size_bytes
        if sighting.ending is Ending.WHOLE:
            left_bytes -= self.tail_bytes
        return left_bytes / self.token_bytes if self.token_bytes and left_bytes > 0 else 0.0


class Scale:
    """How many tokens an engine makes for each that the bytes of its answers tell of, by its own counter.

    An event may have several: by an engine's option, when it guesses tokens ahead, or when its clients are slow. All
    counts fade by looks, of which there is one a second. What is told comes a second or more later than it is counted,
    so nothing is learned while the tokens of the last two looks are a large part of all.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._generated: int | None = None
        self._exact = 0
        self._made = 0
        self._told = self._told_in_all = self._made_in_all = 0.0

    def counted(self, tokens: int) -> None:
        """Note tokens of answers that were read, or are taken back from those."""
        self._exact += tokens

    def told(self, tokens: float) -> None:
        """Note tokens by the bytes of an answer that goes past."""
        self._told += tokens

    def look(self, generated: int | None, sequences: int, is_alone: bool) -> None:
        """Learn from the engine's counter of tokens. Each of `sequences` may have one that is on its way.

        Nothing is learned unless the engine works for us alone (`is_alone`).
        """
        before, self._generated = self._generated, generated
        exact, told, self._exact, self._told = self._exact, self._told, 0, 0.0
        if generated is None or before is None or generated < before or not is_alone:
            return
        made_before, self._made = self._made, generated - before - exact
        self._made_in_all = self._made_in_all * FADING + self._made
        self._told_in_all = self._told_in_all * FADING + told
        unsure = max(self._made, made_before) + sequences
        if self._told_in_all >= TOLD_FEWEST and unsure <= UNSURE_MAX * self._made_in_all:
            self.factor = min(SEVERAL_MAX, max(1.0, self._made_in_all / self._told_in_all))


class Run(Protocol):
    """A run whose answer somebody else carries."""

    effect: Dispatch
    ticket: Ticket
    tokens: int
    waits_for_client: bool
    goes_past: bool


def first_token(run: Run, unseen: Unseen | None) -> FirstToken:
    """Return the event of a run's first token; `unseen` is what is seen of the rest, if that may go past us."""
    is_unheard = unseen is not None and not unseen.tells
    return FirstToken(run.effect.request, run.effect.attempt, is_unheard, unseen is not None)


class Follower:
    """Follows the answers of one engine. `lacks(run, is_silent)` returns True if it has a run no longer."""

    def __init__(
        self,
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        lacks: Callable[[Any, bool], Awaitable[bool]],
    ) -> None:
        self.scale = Scale()
        self._post, self._heard, self._lacks = post, heard, lacks

    async def follow(self, run: Run, unseen: Unseen, read: Read, broke: Callable[[str], Awaitable[None]]) -> None:
        """Follow a run's answer until its end is told, or its engine has it no longer, and post that.

        `broke(cause)` ends a run whose engine broke off.
        """
        run.goes_past = run.waits_for_client = True  # nothing has to come from the engine
        key = run.effect.request, run.effect.attempt
        if not read.token_bytes:
            self._post(first_token(run, unseen))
        told = 0.0

        def hear(sighting: Sighting) -> None:
            nonlocal told
            before, told = told, max(told, read.told(sighting))
            self._count(run, read.tokens + round(told * self.scale.factor), told - before)

        unseen.on_progress = hear
        try:
            while (sighting := await self._next_of(run, unseen)) is not None:
                if sighting.ending is Ending.LOST:
                    break
                hear(sighting)
                if sighting.ending is Ending.BROKE:
                    await broke(sighting.cause)
                    return
                if sighting.ending is Ending.LATE:
                    text = f"the proxy's timeout ended the answer: {sighting.cause}"
                    self._post(RunFailed(*key, Fault.REJECTED, text, run.tokens))
                    return
                if sighting.ending is not None:
                    self._post(RunEnded(*key, run.tokens, Seen.ESTIMATED, sighting.ending is Ending.CLIENT_LEFT))
                    return
        finally:
            unseen.close()
        self._post(RunEnded(*key, run.tokens, Seen.NOTHING))

    def _count(self, run: Run, tokens: int, told: float) -> None:
        """Note an estimate of a run's tokens. It never falls, and is at most what the request may have."""
        facts = run.ticket.facts
        if facts is not None and facts.output_tokens_max:
            tokens = min(tokens, int(facts.output_tokens_max))
        more = max(0, tokens - run.tokens)
        run.tokens += more
        self._heard(run.effect.request, more)
        self.scale.counted(-more)  # it was not counted
        self.scale.told(told)

    async def _next_of(self, run: Run, unseen: Unseen) -> Sighting | None:
        """Return the next thing that is seen of an answer; None once its end must be lost."""
        while True:
            try:
                left_s = unseen.told_s + QUIET_S - monotonic()
                async with asyncio.timeout(left_s if left_s > 0 else QUIET_S):
                    return await unseen.next()
            except TimeoutError:
                is_quiet = monotonic() - unseen.told_s >= QUIET_S
                if is_quiet and await self._lacks(run, unseen.is_lost):
                    return None
