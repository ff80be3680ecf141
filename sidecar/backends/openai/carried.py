"""A server whose requests carry their adapter, an id and a folder: nothing is loaded or unloaded by a call.

An id means its first content for the life of the engine, so the id is a hash of the content. A load is a request of
ours for one token. It is unary, because a stream begins before the adapter is in. Loads go one at a time: each holds up
all running answers. The engine never frees an adapter's memory, so the versions that it was given are counted.

An adapter that does not fit ends the engine, and more adapters at once than it has slots for fail all that runs. So
adapters are checked before they are staged, and the core keeps the number of different ones in flight, loads included,
within the slots.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sidecar.backends.api import HttpForm, LoadResult, Wear, Weights
from sidecar.backends.http_client import NotReached, TimedOut, WireError
from sidecar.backends.openai.backend import OpenAiBackend, content_name
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.naming import InBody, Lora
from sidecar.backends.openai.probe import prober_of
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused

logger = logging.getLogger(__name__)


class CarryingBackend(OpenAiBackend):
    """One such server. `owner` is this replica's id, "" if there is only one.

    Clients that wait for a dead engine are never answered, so silence is its only sign.
    """

    def __init__(self, dialect: Dialect, entry: Any, declared: EngineFacts, owner: str = "") -> None:
        super().__init__(dialect, entry, declared)
        self._owner = owner
        self._is_said_to_restart = False
        self._slots_found: int | None = None
        """Fewer slots than declared, once the engine has failed with more adapters at once."""
        self._is_proven = False
        """The engine was seen to compute with an adapter."""
        self._loading = asyncio.Lock()
        self._keys: dict[int, str] = {}
        """The packed keys of the ids that the engine has been given since it was started, as far as is known."""
        self._given_before = 0
        """How many more it was given by other replicas, as they said."""

    async def _reach(self) -> EngineFacts:
        try:
            return await super()._reach()
        except NotReached:
            self._began_anew()  # nothing listens there, so the engine has ended
            raise

    async def _identified(self, found: Found) -> None:
        """Do nothing: the server tells nothing of adapters."""

    async def _examined(self, before: Measures) -> None:
        if self._seen.inside or self._was_cut_lately:
            await self._let_go()  # of what we, or a sidecar before us, left running
        self._count_restart(before.steps, self._seen.steps)
        self._is_proven = False
        if not self._owner:  # with several replicas others may be using all slots: its owner proves it before a load
            await self._prove()

    def _facts(self) -> EngineFacts:
        facts = super()._facts()
        if facts.device_pages is None or self._slots_found is None:
            return facts
        return replace(facts, device_pages=min(facts.device_pages, self._slots_found))

    async def _prove(self) -> None:
        """Find out whether the engine computes with adapters at all. Raises Misused if it does not.

        With LoRA switched off it answers as the base model and says nothing.
        """
        prober = None if self._is_proven else prober_of(self._dialect, self._server, self._entry, self._patience_s)
        if prober is None:
            return
        try:
            problem = await prober.problem(self._found.version)
        finally:
            self._keys |= prober.asked
        if problem:
            raise self._server.unusable(f"{problem}; {self._dialect.proof_remedy}")
        self._is_proven = True

    def keeps_at_least(self, versions: int) -> None:
        self._given_before = max(0, versions - len(self._keys))

    def _began_anew(self) -> None:
        self._keys.clear()
        self._given_before = 0

    def _count_restart(self, before: int | None, now: int | None) -> None:
        """Count anew if the engine's steps began again, or if it is said to have restarted and they are not known.

        Else only the connection was lost, or something else was restarted, and the engine keeps what it has.
        """
        is_known = before is not None and now is not None
        if (before or 0) > (now or 0) if is_known else self._is_said_to_restart:
            self._began_anew()
        elif self._is_said_to_restart and (kept := self._kept()) is not None and kept.is_out:
            logger.warning("%s was not restarted: its steps go on from %s to %s", self.id, before, now)
        self._is_said_to_restart = False

    def restarted(self) -> None:
        self._is_said_to_restart = True
        super().restarted()

    def _kept(self) -> Wear | None:
        if self._declared.base_only:
            return None
        return Wear(len(self._keys) + self._given_before, self._entry.host_versions_max)

    def _held(self) -> str:
        wear, kept = self._kept(), ""
        if wear is not None:
            of_how_many = "" if wear.limit is None else f" of {wear.limit} that it may keep"
            kept = f", {wear.versions} adapter versions{of_how_many} in its memory" + ("; restart it" * wear.is_out)
        unproven = "" if self._is_proven or self._declared.base_only else "; not seen yet to compute with an adapter"
        return f"{kept}{unproven}"

    # Runs.

    def _naming(self, effect: Dispatch, form: HttpForm) -> InBody:
        lora = self._lora(effect, effect.task_id, effect.packed_key) if effect.packed_key else None
        return InBody(form, self._dialect.lora_member, lora)

    def _lora(self, effect: Dispatch | Load, task_id: int, key: str) -> Lora:
        self._keys[task_id] = key
        return Lora(content_name(effect), task_id, self._path(key))

    def _run_failed(self, fault: Fault) -> None:
        if fault is Fault.DEADLY and self._up:
            self._tasks.spawn(self._wire_broke("an adapter has ended it"))
        if fault is not Fault.FULL or not self._takes:
            return
        at_once = len({run.effect.packed_key for run in self._runs.values() if run.effect.packed_key})
        self._slots_found = max(1, at_once + len(self._sent) - 1)
        self._close(
            f"its batch has fewer slots for adapters than the {at_once} that ran: is lora_config.max_loras what the "
            f"server was started with? {self._slots_found} at once are used until the sidecar is started again"
        )

    # Loads.

    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        packed = effect.packed
        if self._keys.get(packed.task_id, packed.key) != packed.key:
            return LoadResult("its id is that of another adapter in this engine; refresh one of the two")
        async with self._loading:
            await weights.ready()
            try:
                await self._prove()
            except Misused as unproven:
                return LoadResult(unproven.message, lost=True)
            self._load_sent(effect.load)
            lora = self._lora(effect, packed.task_id, packed.key)
            body = self._dialect.one_token(self._found.served.base) | {self._dialect.lora_member: lora.record}
            try:
                status, text = await self._server.ask(body, self._entry.load_timeout_s, effect.epoch)
            except TimedOut:
                await self._let_go()
                text = f"the engine did not take the adapter within {self._entry.load_timeout_s:g} s"
                return LoadResult(text, unanswered=True)
            except WireError as error:
                return LoadResult(self._error_text(error), lost=True)
        if status == HTTPStatus.OK:
            return LoadResult(None)
        fault = self._dialect.fault_of(status, text)
        self._run_failed(fault)
        return LoadResult(text, lost=fault is Fault.LOST, means=fault)
