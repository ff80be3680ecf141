"""The backend of trtllm-serve, TensorRT-LLM's OpenAI server, over HTTP/1.1 connections that are kept.

Nothing is loaded or unloaded by a call: each request carries the adapter's id and folder, and an id means its first
content for the life of the engine. So the id is a hash of the content. A load is a request of ours for one token. It is
unary, because a stream begins before the adapter is in. Loads go one at a time: each holds up all running answers.

An adapter that does not fit ends the engine, and more adapters at once than it has slots for fail all that runs. So
adapters are checked before they are staged, and the core keeps the number of different ones in flight, loads included,
within `max_loras`.

Clients that wait for a dead engine are never answered, so silence is its only sign (`Pulse`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from http import HTTPStatus
from time import monotonic

from sidecar.backends.api import HttpForm, LoadResult, Ticket, Wear, Weights
from sidecar.backends.credentials import open_http_client
from sidecar.backends.endpoint import Endpoint
from sidecar.backends.engine_facts import unknown_phrase
from sidecar.backends.http_client import NotReached, TimedOut, WireError
from sidecar.backends.pulse import Pulse
from sidecar.backends.trtllm.api import Lora, Measures, TrtllmApi, fault_of
from sidecar.backends.trtllm.kind import EXPERIMENTAL, MODEL, TrtllmEntry
from sidecar.backends.trtllm.probe import PROMPTS, Prober
from sidecar.backends.trtllm.run import TrtllmRun
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import BackendMeasured
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
KEEP_S = 2.0
"""The server closes a connection after 5 idle seconds: ours must be given up before."""
NOTICED_S = 1.25
"""The server asks once a second whether a client is still there."""
DIGEST_CHARACTERS = 12


class TrtllmBackend(Endpoint):
    """One trtllm-serve. `owner` is this replica's id, "" if there is only one."""

    WIRE_ERRORS = (WireError,)
    streams = True

    def __init__(self, entry: TrtllmEntry, declared: EngineFacts, owner: str = "") -> None:
        pulse = Pulse(entry.progress_timeout_s, monotonic())
        super().__init__(entry.identity, entry.address, entry.progress_timeout_s, pulse, entry.tls_files is not None)
        self._entry = entry
        self._declared = declared
        self._owner = owner
        self._client = open_http_client(entry.address, entry.tls_files, None, KEEP_S, CONNECT_TIMEOUT_S)
        self._api = TrtllmApi(entry.identity, self._client)
        self._version = ""
        self._unknown = ""
        self._is_said_to_restart = False
        self._cut_at_s = -NOTICED_S
        """When the last connection was closed on a running request."""
        self._stepping = asyncio.Lock()
        self._stepped_since_s = 0.0
        """When the last probe was sent that has been answered."""
        self._seats: int | None = None
        self._seen = Measures()
        self._slots_found: int | None = None
        """Fewer slots than declared, once the engine has failed with more adapters at once."""
        self._is_proven = False
        """The engine was seen to compute with an adapter."""
        self._loading = asyncio.Lock()
        self._keys: dict[int, str] = {}
        """The packed keys of the ids that the engine has been given since it was started, as far as is known."""
        self._given_before = 0
        """How many more it was given by other replicas, as they said."""
        logger.warning("%s: %s", entry.identity, EXPERIMENTAL)

    # Reaching and looking.

    async def _reach(self) -> EngineFacts:
        try:
            await self._api.healthy()
        except NotReached:
            self._count_anew()  # nothing listens there, so the engine has ended
            raise
        self._version = await self._api.version()
        model = await self._api.model()
        self._seats = await self._api.seats()
        status, text = await self._api.ask(PROMPTS[0], 1, self._patience_s)
        if status != HTTPStatus.OK:
            raise Misused(Reason.BACKEND_UNREACHABLE, f"{self.id}: the engine answers no token: {text}")
        before, self._seen = self._seen, await self._api.measures()
        if self._seen.active or monotonic() - self._cut_at_s < NOTICED_S:
            await self._let_go()  # of what we, or a sidecar before us, left running
        self._count_restart(before.steps, self._seen.steps)
        self._is_proven = False
        if not self._owner:  # with several replicas others may be using all slots: its owner proves it before a load
            await self._prove()
        self.pulse.begin(monotonic())
        self.pulse.counted(self._seen.steps, monotonic())
        facts = self._facts(model)
        self._unknown = unknown_phrase(facts)
        return facts

    def _facts(self, model: str) -> EngineFacts:
        declared = self._declared
        slots = declared.device_pages
        if slots is not None and self._slots_found is not None:
            slots = min(slots, self._slots_found)
        return replace(
            declared,
            kind=MODEL.name,
            models=(model,),
            device_pages=slots,
            seats=declared.seats or self._seats,
            kv_tokens=declared.kv_tokens or self._seen.kv_tokens,
        )

    async def _prove(self) -> None:
        """Find out whether the engine computes with adapters at all. Raises Misused if it does not.

        With LoRA switched off it answers as the base model and says nothing.
        """
        entry = self._entry
        base = entry.base()
        if self._is_proven or entry.shared_dir is None or entry.lora_config is None or base is None:
            return
        prober = Prober(self._api, entry.shared_dir, base, entry.lora_config, self._patience_s)
        try:
            problem = await prober.problem(self._version)
        finally:
            self._keys |= prober.asked
        if problem:
            raise Misused(
                Reason.BACKEND_UNREACHABLE,
                f"{self.id}: {problem}; start trtllm-serve with a lora_config (--extra_llm_api_options FILE) that has "
                "the modules of this entry's, and where it sees the shared folder",
            )
        self._is_proven = True

    async def _look(self) -> str | None:
        await self._api.healthy()
        self.pulse.seen(monotonic())
        seen = await self._api.measures()
        if self.pulse.counted(seen.steps, monotonic()):
            self._count_anew()
            return "it has restarted"
        if seen != Measures():
            self._seen = seen
        return None

    def keeps_at_least(self, versions: int) -> None:
        self._given_before = max(0, versions - len(self._keys))

    def _count_anew(self) -> None:
        """Count from nothing: the engine was started again."""
        self._keys.clear()
        self._given_before = 0

    def _count_restart(self, before: int | None, now: int | None) -> None:
        """Count anew if the engine's steps began again, or if it is said to have restarted and they are not known.

        Else only the connection was lost, or something else was restarted, and the engine keeps what it has.
        """
        is_known = before is not None and now is not None
        if (before or 0) > (now or 0) if is_known else self._is_said_to_restart:
            self._count_anew()
        elif self._is_said_to_restart and (kept := self._kept()) is not None and kept.is_out:
            logger.warning("%s was not restarted: its steps go on from %s to %s", self.id, before, now)
        self._is_said_to_restart = False

    def restarted(self) -> None:
        self._is_said_to_restart = True
        super().restarted()

    async def _steps(self) -> int | None:
        return (await self._api.measures()).steps

    async def _inside(self) -> int | None:
        return (await self._api.measures()).active

    def _seen_inside(self) -> int | None:
        return self._seen.active

    async def _answers(self, within_s: float) -> bool:
        try:
            status, _ = await self._api.ask(PROMPTS[0], 1, within_s)
        except WireError:
            return False
        return status == HTTPStatus.OK

    async def _look_after(self, text: str) -> None:
        """Find out whether the engine lives. A server may be well, by its own word, while its engine is gone."""
        try:
            await self._api.healthy()
        except (WireError, Misused):
            is_there = False
        else:
            is_there = await self._answers(self._patience_s)
        if self._up and not is_there:
            self._lose(text)

    def _measures(self) -> BackendMeasured | None:
        facts, seen = self._declared, self._seen
        kv_tokens = facts.kv_tokens or seen.kv_tokens
        if kv_tokens is None:
            return None
        return BackendMeasured(self.id, facts.seats or self._seats, kv_tokens, seen.kv_used)

    def _kept(self) -> Wear | None:
        if self._declared.base_only:
            return None
        return Wear(len(self._keys) + self._given_before, self._entry.host_versions_max)

    def _describe(self) -> str:
        version = f" {self._version}" if self._version else ""
        wear, kept = self._kept(), ""
        if wear is not None:
            of_how_many = "" if wear.limit is None else f" of {wear.limit} that it may keep"
            kept = f", {wear.versions} adapter versions{of_how_many} in its memory" + ("; restart it" * wear.is_out)
        unproven = "" if self._is_proven or self._declared.base_only else "; not seen yet to compute with an adapter"
        return f"reached, trtllm-serve{version}{kept}{unproven}{self._unknown}"

    # Runs.

    def _begin(self, effect: Dispatch, ticket: Ticket) -> TrtllmRun:
        form = ticket.payload.head_for(MODEL.name)
        assert isinstance(form, HttpForm), "a request in gRPC's form for an HTTP server"
        lora = None
        if effect.packed_key:
            lora = self._lora(effect.name, effect.digest, effect.task_id, effect.packed_key)
        return TrtllmRun(
            effect, ticket, form, lora, self._post, self._heard, self._broke, self.follower, self._run_failed
        )

    async def _broke(self, text: str, begun: bool) -> bool:
        """Find out what became of the engine after a run's connection broke, and let it end what it still runs."""
        if await self._wire_broke(text, begun):
            return True
        await self._let_go()
        return not self._up

    def _lora(self, name: str, digest: str, task_id: int, key: str) -> Lora:
        assert self._entry.shared_dir is not None, "an adapter for a server without a shared folder"
        self._keys[task_id] = key
        return Lora(f"{name}@{digest[:DIGEST_CHARACTERS]}", task_id, self._entry.shared_dir.engine_path(key))

    async def _go(self, run: TrtllmRun, weights: Weights | None) -> None:
        try:
            await run.go(self._client)
        except asyncio.CancelledError:
            self._cut_at_s = monotonic()
            if run.cancelled and self._up:
                await self._let_go()  # until then the engine still runs it, and its adapter takes a slot
            raise

    async def _let_go(self) -> None:
        """Return once the engine has ended the requests whose connections were closed before.

        The server notices that within a second, and tells the engine, which hears of it between two steps. A request of
        ours that is sent after that, and answered, has been through a step without them, however long its steps take.
        """
        closed_s = monotonic()
        await asyncio.sleep(NOTICED_S)
        async with self._stepping:
            if self._stepped_since_s < closed_s + NOTICED_S:
                sent_s = monotonic()
                if await self._answers(self._patience_s):
                    self._stepped_since_s = sent_s

    def _run_failed(self, fault: Fault) -> None:
        """Note what an engine's error says of the engine itself."""
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
            lora = self._lora(effect.name, effect.digest, packed.task_id, packed.key)
            try:
                status, text = await self._api.ask(PROMPTS[0], 1, self._entry.load_timeout_s, lora, effect.epoch)
            except TimedOut:
                await self._let_go()
                text = f"the engine did not take the adapter within {self._entry.load_timeout_s:g} s"
                return LoadResult(text, unanswered=True)
            except WireError as error:
                return LoadResult(self._error_text(error), lost=True)
        if status == HTTPStatus.OK:
            return LoadResult(None)
        fault = fault_of(status, text)
        self._run_failed(fault)
        return LoadResult(text, lost=fault is Fault.LOST, means=fault)

    def _was_lost(self) -> None:
        self._cut_at_s = monotonic()

    async def _leave(self) -> None:
        await self._client.close()

    @staticmethod
    def _is_late(error: Exception) -> bool:
        return isinstance(error, TimedOut)
