"""The backend of vLLM's OpenAI server, over HTTP/1.1 connections that are kept.

Each version of an adapter has a folder of its own on a file system that the engine sees, and a name of its own there:
`sql@3f0c2e9a1b7d`. A name is loaded before requests use it, and unloaded before its files are removed: an engine that
misses the files of a registered name dies of it. Changed files at a path that the engine has seen give wrong answers
out of its prefix cache, so no path ever holds two contents; what is loaded in place is what was there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from time import monotonic
from typing import Any

from sidecar.backends.api import HttpForm, LoadResult, Ticket, Weights
from sidecar.backends.credentials import open_http_client
from sidecar.backends.endpoint import Endpoint
from sidecar.backends.engine_facts import unknown_phrase
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.openai.run import message_of
from sidecar.backends.pulse import Pulse
from sidecar.backends.vllm.api import ALREADY, Measures, Served, Version, VllmApi, fault_of, is_too_old
from sidecar.backends.vllm.fitting import Fitting
from sidecar.backends.vllm.kind import MODEL, VllmEntry
from sidecar.backends.vllm.run import VllmRun
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import BackendMeasured
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = CLOSE_TIMEOUT_S = 5.0
KEEP_S = 2.0
"""vLLM's server closes a connection after 5 idle seconds: ours must be given up before."""
UNLOAD_TIMEOUT_S = 30.0
FORGET_AGAIN_S, FORGET_AGAIN_MAX_S = 0.05, 5.0
DIGEST_CHARACTERS = 12
RUST_BODY_BYTES_MAX = 32 << 20
"""What its Rust front end takes, unless VLLM_HTTP_MAX_REQUEST_BODY_SIZE says otherwise."""


class VllmBackend(Endpoint):
    """One vLLM server."""

    WIRE_ERRORS = (WireError,)
    streams = True

    def __init__(self, entry: VllmEntry, declared: EngineFacts, *, tries_sizes: bool = False) -> None:
        pulse = Pulse(entry.progress_timeout_s, monotonic())
        super().__init__(entry.identity, entry.address, entry.progress_timeout_s, pulse, entry.tls_files is not None)
        self._entry = entry
        self._declared = declared
        self._client = open_http_client(entry.address, entry.tls_files, entry.api_key_file, KEEP_S, CONNECT_TIMEOUT_S)
        self._api = VllmApi(entry.identity, self._client)
        shared_dir = entry.shared_dir
        self._fitting = None
        if tries_sizes and shared_dir is not None:
            self._fitting = Fitting(self._api, shared_dir, entry.load_timeout_s)
        self._base = ""
        self._version = Version("")
        self._unknown = ""
        self._distrusted = False
        self._takes_none = ""
        """Why it takes no adapters; "" if it does."""
        self._said: set[tuple[object, ...]] = set()
        """What the log has been told of how it was started."""
        self._registered: dict[str, str] = {}
        """The engine's name of each packed key that is registered there."""
        self._others = 0
        self._seen = Measures()

    # Reaching and looking.

    async def _reach(self) -> EngineFacts:
        await self._api.healthy()
        self._version = await self._api.version()
        if is_too_old(self._version.number) and not self._entry.old_versions:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"{self.id}: {self._version} can answer with another adapter's weights while one is loaded "
                "(vllm#47724); upgrade to 0.32 or newer, or set old_versions: true to use it all the same",
            )
        served = await self._api.models()
        self._base = served.base
        await self._clear_away(served.adapters)
        self._seen = await self._api.measures()
        config, shared_dir = await self._api.lora_config(), self._entry.shared_dir
        has_lora = self._seen.has_lora or bool(config)
        self._takes_none = ""
        if shared_dir is not None:
            self._takes_none = await self._api.why_no_adapters(shared_dir.engine, has_lora)
        is_told = self._seen.slots or (self._declared.device_pages and not has_lora)
        if self._distrusted or not (is_told or self._takes_none):
            await self._api.answer_once(self._base, self._patience_s)
            self._seen = await self._api.measures()  # the slots are published from the first answer on
        if self._fitting is not None:
            self._fitting.forget()
        self.pulse.begin(monotonic())
        self.pulse.counted(self._seen.steps, monotonic())
        self.pulse.generated(self._seen.generated, monotonic())
        self._distrusted = False
        facts = self._facts(served, config or {})
        self._unknown = unknown_phrase(facts)
        return facts

    def _facts(self, served: Served, config: Mapping[str, Any]) -> EngineFacts:
        """Return the declared facts, filled with what the server says. A page is one adapter here."""
        declared, seen = self._declared, self._seen
        slots = self._least("device_pages", "max_loras", seen.slots or config.get("max_loras"))
        host_pages = self._least("host_pages", "max_cpu_loras", config.get("max_cpu_loras"))
        if self._takes_none:
            self._say_once("%s takes no adapters, so it serves its base model only: %s", self.id, self._takes_none)
        return replace(
            declared,
            kind=MODEL.name,
            reads_files=MODEL.reads_files,
            models=(served.base,),
            base_only=declared.base_only or bool(self._takes_none),
            unloads="weights" if self._version.is_rust else "name",
            without_lora=bool(self._takes_none),
            rank_max=self._least("rank_max", "max_lora_rank", config.get("max_lora_rank")),
            device_pages=slots,
            host_pages=host_pages or slots,
            host_pages_assumed=host_pages is None,
            kv_tokens=declared.kv_tokens or seen.kv_tokens,
            sequence_tokens_max=declared.sequence_tokens_max or served.sequence_tokens_max,
        )

    def _least(self, key: str, option: str, found: int | None) -> int | None:
        """Return the smaller one of what is declared and what was found, and say once if less was found."""
        declared: int | None = getattr(self._declared, key)
        if declared is not None and found is not None and found < declared:
            text = "%s: engine.%s is declared as %s and it was started with %s %s: the smaller number is used"
            self._say_once(text, self.id, key, declared, option, found)
        return min((each for each in (declared, found) if each is not None), default=None)

    def _say_once(self, *said: object) -> None:
        if said not in self._said:
            self._said.add(said)
            logger.warning(*said)

    async def _clear_away(self, adapters: dict[str, str]) -> None:
        """Forget names that a restart has lost, and unload those whose files are gone."""
        self._registered = {key: name for key, name in self._registered.items() if name in adapters}
        await self._unload_gone(adapters)

    async def files_removed(self) -> None:
        try:
            if self._up:
                await self._unload_gone((await self._api.models()).adapters)
        except (WireError, Misused) as error:
            logger.info("%s keeps names whose files have gone: %s", self.id, self._error_text(error))

    async def _unload_gone(self, adapters: dict[str, str]) -> None:
        ours = set(self._registered.values())
        self._others = 0
        for name, path in adapters.items():
            if name in ours:
                continue
            if await asyncio.to_thread(self._is_gone, path):
                logger.info("%s: unloading %s, whose files have gone", self.id, name)
                if not await self._api.forget(name, path, UNLOAD_TIMEOUT_S):
                    logger.warning("%s keeps the name %s until it is restarted: its files have gone", self.id, name)
            else:
                self._others += 1

    def _is_gone(self, engine_path: str) -> bool:
        """Return True if the engine knows a folder in the shared place that no longer exists."""
        shared_dir = self._entry.shared_dir
        ours = None if shared_dir is None else shared_dir.ours_of(engine_path)
        return ours is not None and not ours.is_dir()

    async def _look(self) -> str | None:
        await self._api.healthy()
        self.pulse.seen(monotonic())
        before, self._seen = self._seen, await self._api.measures()
        went_back = self.pulse.counted(self._seen.steps, monotonic())
        self.pulse.generated(self._seen.generated, monotonic())
        if went_back or (before.started_at and self._seen.started_at and self._seen.started_at != before.started_at):
            return "it has restarted"
        return None

    async def _steps(self) -> int | None:
        return (await self._api.measures()).steps

    async def _inside(self) -> int | None:
        return (await self._api.measures()).inside

    def _seen_inside(self) -> int | None:
        return self._seen.inside

    def _seen_generated(self) -> int | None:
        return self._seen.generated

    async def _answers(self, within_s: float) -> bool:
        try:
            await self._api.answer_once(self._base, within_s)
        except WireError:
            return False
        return True

    async def _look_after(self, text: str) -> None:
        try:
            await self._api.healthy()
        except (WireError, Misused):
            if self._up:
                self._lose(text)

    def _measures(self) -> BackendMeasured | None:
        facts, seen = self._declared, self._seen
        if seen.kv_tokens is None:
            return None
        return BackendMeasured(self.id, facts.seats, facts.kv_tokens or seen.kv_tokens, seen.kv_used)

    def _describe(self) -> str:
        others = f"; {self._others} adapters that others loaded are left alone" if self._others else ""
        registered = (
            f"takes no adapters: {self._takes_none}"
            if self._takes_none
            else f"{len(self._registered)} adapters registered"
        )
        return f"reached, {self._version}, {registered}{others}{self._unknown}"

    # Runs.

    def _begin(self, effect: Dispatch, ticket: Ticket) -> VllmRun:
        form = ticket.payload.head_for(MODEL.name)
        assert isinstance(form, HttpForm), "a request in gRPC's form for an HTTP server"
        name = self._registered.get(effect.packed_key, _name(effect)) if effect.packed_key else self._base
        run = VllmRun(effect, ticket, form, name, self._post, self._heard, self._wire_broke, self.follower)
        run.body_bytes_max = RUST_BODY_BYTES_MAX if self._version.is_rust else None
        return run

    async def _go(self, run: VllmRun, weights: Weights | None) -> None:
        await run.go(self._client)

    # Loads.

    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        await weights.ready()
        self._load_sent(effect.load)
        try:
            misfit = await self._misfit(effect.packed.key)
            if misfit is not None:
                return LoadResult(misfit, means=Fault.REJECTED)
            name = self._registered.setdefault(effect.packed.key, _name(effect))
            path = self._path(effect.packed.key)
            reply = await self._api.load(name, path, self._entry.load_timeout_s, effect.epoch)
        except TimedOut:
            text = f"the engine did not take the adapter within {self._entry.load_timeout_s:g} s"
            return LoadResult(text, unanswered=True)
        except WireError as error:
            return LoadResult(self._error_text(error), lost=True)
        text = message_of(reply.body)
        status = reply.status
        if reply.is_ok or (status == HTTPStatus.BAD_REQUEST and ALREADY.search(text)):
            return LoadResult(None)
        # A bad adapter is a 500 of a healthy engine; so is an engine's end.
        lost = fault_of(status, text) is Fault.LOST or (status >= 500 and await self._wire_broke(text))
        self._registered.pop(effect.packed.key, None)
        return LoadResult(text, lost=lost)

    async def _misfit(self, key: str) -> str | None:
        """Return why the engine would answer wrongly by a staged version, if its model's sizes are not known here."""
        shared_dir = self._entry.shared_dir
        if self._fitting is None or shared_dir is None:
            return None
        try:
            return await self._fitting.misfit(shared_dir.ours / key)
        except OSError as error:
            logger.warning("%s: sizes are not tried: %s", self.id, error)
            return None

    async def forget(self, key: str) -> None:
        pause_s = FORGET_AGAIN_S
        while self._up and key in self._registered:
            try:
                if await self._api.forget(self._registered[key], self._path(key), UNLOAD_TIMEOUT_S):
                    await self._read_no_more()
                    break
                trouble = "it keeps the name"
            except WireError as error:
                trouble = self._error_text(error)
            logger.info("%s does not forget %s yet: %s", self.id, key, trouble)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, FORGET_AGAIN_MAX_S)
        self._registered.pop(key, None)

    async def _read_no_more(self) -> None:
        """Return when no step can read the files of a name that has just been unloaded.

        The Rust front end takes the engine's copy away at once. If a request that was cancelled is not withdrawn yet,
        the next step reads the files again; had they gone, the engine would die.
        """
        before = (await self._api.measures()).steps if self._version.is_rust else None
        while self._up and before is not None:
            now = await self._api.measures()
            if not now.inside or now.steps is None or now.steps > before + 1:
                return
            await asyncio.sleep(FORGET_AGAIN_S)

    def _path(self, key: str) -> str:
        shared_dir = self._entry.shared_dir
        assert shared_dir is not None, "an adapter for a server without a shared folder"
        return shared_dir.engine_path(key)

    async def _leave(self) -> None:
        if self._client.is_closed:
            return  # a process that crashes stops its backends whatever was stopped already
        await self._unload_all()
        await self._client.close()

    async def _unload_all(self) -> None:
        """Have the server forget what it would look for in vain: the files go with this process."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for key, name in list(self._registered.items()):  # a load may end meanwhile
                    await self._api.forget(name, self._path(key), CLOSE_TIMEOUT_S)
        except (WireError, TimeoutError) as error:
            logger.info("%s was not told to forget its adapters: %s", self.id, self._error_text(error))

    def _was_lost(self) -> None:
        self._distrusted = True  # until it has answered a token

    @staticmethod
    def _is_late(error: Exception) -> bool:
        return isinstance(error, TimedOut)


def _name(effect: Load | Dispatch) -> str:
    """Return the engine's name for a version: its content says which, its name is for people."""
    key = effect.packed.key if isinstance(effect, Load) else effect.packed_key
    generation = key.rpartition(".g")[2]
    suffix = "" if generation == "0" else f".g{generation}"
    return f"{effect.name}@{effect.digest[:DIGEST_CHARACTERS]}{suffix}"
