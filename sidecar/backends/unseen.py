"""Follow an answer of which the rest goes past this process: count its tokens by bytes, and tell the core its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.backends.api import Ending, Sighting, Ticket, Unseen
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault, Seen
from sidecar.core.events import Event, FirstToken, RunEnded, RunFailed

QUIET_S = 10.0
"""How long nothing is told of an answer that goes past us before its engine is asked."""


class Sightings:
    """What is told of an answer that goes past us, as it is told."""

    def __init__(self) -> None:
        self.goes_on = False
        self._came: asyncio.Queue[Sighting] = asyncio.Queue()

    def take(self, sighting: Sighting) -> None:
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

    def tokens_at(self, sighting: Sighting) -> int:
        """Return an estimate of the tokens of an answer of which so many bytes have gone past."""
        left_bytes = sighting.body_bytes - self.size_bytes
        if sighting.ending is Ending.WHOLE:
            left_bytes -= self.tail_bytes
        return self.tokens + (round(left_bytes / self.token_bytes) if self.token_bytes and left_bytes > 0 else 0)


class Run(Protocol):
    """A run whose answer somebody else carries."""

    effect: Dispatch
    ticket: Ticket
    tokens: int
    waits_for_client: bool


def first_token(run: Run, unseen: Unseen | None) -> FirstToken:
    """Return the event of a run's first token; `unseen` is what is seen of the rest, if that may go past us."""
    is_unheard = unseen is not None and not unseen.tells
    return FirstToken(run.effect.request, run.effect.attempt, is_unheard, unseen is not None)


async def follow(
    run: Run,
    unseen: Unseen,
    read: Read,
    post: Callable[[Event], None],
    heard: Callable[[int, int], None],
    lacks: Callable[[Any], Awaitable[bool]],
    broke: Callable[[str], Awaitable[None]],
) -> None:
    """Follow a run's answer until its end is told, or its engine has it no longer (`lacks`), and post that.

    `broke(cause)` ends a run whose engine broke off.
    """
    run.waits_for_client = True  # nothing has to come from the engine
    key = run.effect.request, run.effect.attempt
    if not read.token_bytes:
        post(first_token(run, unseen))
    try:
        while (sighting := await _next_of(run, unseen, lacks)) is not None:
            if sighting.ending is Ending.LOST:
                break
            tokens = max(run.tokens, read.tokens_at(sighting))
            if tokens > run.tokens and (most := _tokens_max(run)):
                tokens = max(run.tokens, min(tokens, most))
            heard(run.effect.request, tokens - run.tokens)
            run.tokens = tokens
            if sighting.ending is Ending.BROKE:
                await broke(sighting.cause)
                return
            if sighting.ending is Ending.LATE:
                text = f"the proxy's timeout ended the answer: {sighting.cause}"
                post(RunFailed(*key, Fault.REJECTED, text, run.tokens))
                return
            if sighting.ending is not None:
                post(RunEnded(*key, run.tokens, Seen.ESTIMATED, sighting.ending is Ending.CLIENT_LEFT))
                return
    finally:
        unseen.close()
    post(RunEnded(*key, run.tokens, Seen.NOTHING))


def _tokens_max(run: Run) -> int:
    """Return how many tokens the request may have at most; 0 if that is not known."""
    facts = run.ticket.facts
    return 0 if facts is None else int(facts.output_tokens_max)


async def _next_of(run: Run, unseen: Unseen, lacks: Callable[[Any], Awaitable[bool]]) -> Sighting | None:
    """Return the next thing that is seen of an answer; None once its end must be lost."""
    while True:
        try:
            async with asyncio.timeout(QUIET_S):
                return await unseen.next()
        except TimeoutError:
            if unseen.is_lost or await lacks(run):
                return None
