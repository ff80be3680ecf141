"""Notice an engine with other weights than before, or than others of its base model: it answers, and wrongly.

At each connect, before an engine gets requests, it is asked one greedy question by its base model. Nobody knows the
right answer, so what is told is a difference. One that is gone when it is asked again was rounding.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Literal

from sidecar.backends.api import UNTOLD, Backend, Payload, Prompt, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.backends.kind import Ask
from sidecar.backends.openai.asking import POOLED
from sidecar.backends.openai.paths import generates
from sidecar.backends.registry import base_names, model_kind
from sidecar.core.facts import EngineFacts
from sidecar.shell.requests import RequestFacts

logger = logging.getLogger(__name__)

IDS = (1, 72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100)
"""A prompt whose token ids every vocabulary has."""
TEXT = "Hello, who are you?"
TOKENS = 16
ANSWER_S = 10.0
"""How long an engine may take; of one that takes longer nothing is told."""
KEPT_MAX = 4096

Said = tuple[str, tuple[int, ...]]  # an answer's text, or its token ids


class WeightsCheck:
    """Asks engines and keeps their answers. `differing` says what is wrong with an engine, by id."""

    def __init__(self, mode: Literal["warn", "refuse", "off"]) -> None:
        self.mode = mode
        self.differing: dict[str, str] = {}
        self._said: dict[str, tuple[EngineFacts, Said]] = {}

    async def passes(self, backend: Backend, facts: EngineFacts, present: Collection[str]) -> bool:
        """Ask an engine that has just been reached; return False if it is not to be used. `present` are all ids."""
        for _ in range(2):
            said = await self._ask(backend, facts)
            other = self._other(backend.id, facts, said, present)
            if not other:
                break
        self.differing.pop(backend.id, None)
        if other:
            self.differing[backend.id] = f"{backend.id} answers otherwise than {other}: has it other weights?"
            logger.warning("%s (weights_check: %s)", self.differing[backend.id], self.mode)
            if self.mode == "refuse":
                return False
        if said is not None:
            self._said.pop(backend.id, None)
            self._said[backend.id] = facts, said
            if len(self._said) > KEPT_MAX:
                del self._said[next(iter(self._said))]
        return True

    def _other(self, backend: str, facts: EngineFacts, said: Said | None, present: Collection[str]) -> str:
        """Return who says something else, "" if nobody does; the engine itself, before, comes first."""
        for name, (known, before) in sorted(self._said.items(), key=lambda each: each[0] != backend):
            is_same = known.kind == facts.kind and known.dtype == facts.dtype
            is_same = is_same and generates(known.paths) == generates(facts.paths)
            is_alike = name in present and not {*base_names(known)}.isdisjoint(base_names(facts))
            if said is not None and said != before and is_same and (is_alike or name == backend):
                return "before" if name == backend else name
        return ""

    async def _ask(self, backend: Backend, facts: EngineFacts) -> Said | None:
        """Return an engine's answer; None if it gives none."""
        asking = model_kind(facts.kind).asking if generates(facts.paths) else POOLED
        if asking is None:
            return None
        prompt = Prompt.TOKENS if Prompt.TOKENS in asking.prompts else Prompt.TEXT
        ask = Ask(TEXT if prompt is Prompt.TEXT else None, IDS, TOKENS, top_k=1)
        payload = Payload("", asking.write(ask, backend.streams), True, False, kind=facts.kind, prompt=prompt)
        ticket = Ticket(UNTOLD, payload, "", AnswerBuffers())
        ticket.facts = RequestFacts("", output_tokens_max=TOKENS)
        try:
            async with asyncio.timeout(ANSWER_S):
                await backend.ask(ticket)
        except TimeoutError:
            return None
        except Exception:  # the engine must not be kept out for it
            logger.exception("%s could not be asked for weights_check", backend.id)
            return None
        if ticket.came is None or not ticket.came.final:
            return None
        reader = asking.reader(prompt is Prompt.TEXT)
        pieces = [reader.read(reply) for reply in ticket.replies]
        return "".join(piece.text for piece in pieces), tuple(id_ for piece in pieces for id_ in piece.token_ids)
