"""The backend of a server of the OpenAI family, over HTTP/1.1 connections that are kept.

How adapters get there is the part of its two subclasses: `registered.py` and `carried.py`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from time import monotonic
from typing import Any

from sidecar.backends.api import HttpForm, Ticket, Weights
from sidecar.backends.credentials import open_http_client
from sidecar.backends.endpoint import Endpoint
from sidecar.backends.engine_facts import unknown_phrase
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.naming import Naming
from sidecar.backends.openai.run import OpenAiRun
from sidecar.backends.openai.server import OpenAiServer, Served
from sidecar.backends.pulse import Pulse
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import BackendMeasured
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
DIGEST_CHARACTERS = 12
RESTS = 2
"""Looks at an idle engine of every so many and one that do without its gauges."""


class OpenAiBackend(Endpoint):
    """One server that speaks a dialect. `entry` is its section of the configuration."""

    WIRE_ERRORS = (WireError,)
    streams = True

    def __init__(self, dialect: Dialect, entry: Any, declared: EngineFacts) -> None:
        pulse = Pulse(entry.progress_timeout_s, monotonic())
        super().__init__(entry.identity, entry.address, entry.progress_timeout_s, pulse, entry.tls_files is not None)
        self._dialect = dialect
        self._entry = entry
        self._declared = declared
        key = getattr(entry, "api_key_file", None)
        self._client = open_http_client(entry.address, entry.tls_files, key, dialect.keeps_s, CONNECT_TIMEOUT_S)
        self._server = OpenAiServer(entry.identity, self._client)
        self._found = Found(Served(""))
        self._seen = Measures()
        self._rested = 0
        """How many looks in a row have not read its gauges."""
        self._unknown = ""
        self._distrusted = False
        """It was lost: until it has answered a token."""
        self._said: set[tuple[object, ...]] = set()
        """What the log has been told of how it was started."""
        self._cut_at_s = float("-inf")
        """When the last connection was closed on a running request."""
        self._stepping = asyncio.Lock()
        self._stepped_since_s = 0.0
        """When the last request of ours was sent that has been answered for `_let_go`."""
        if dialect.warning:
            logger.warning("%s: %s", entry.identity, dialect.warning)

    # Reaching and looking.

    async def _reach(self) -> EngineFacts:
        await self._server.healthy(self._dialect.health_path)
        found = await self._dialect.identify(self._server, self._entry)
        await self._identified(found)
        before = self._seen
        self._found = found = await self._dialect.examine(
            self._server, found, self._entry, self._declared, self._distrusted, self._patience_s
        )
        self._seen = found.measures
        await self._examined(before)
        self.pulse.begin(monotonic())
        self.pulse.counted(self._seen.steps, monotonic())
        self.pulse.generated(self._seen.generated, monotonic())
        self._distrusted = False
        facts = self._facts()
        self._unknown = unknown_phrase(facts)
        return facts

    @abstractmethod
    async def _identified(self, found: Found) -> None:
        """Take note of what the server has, before it is asked more."""

    @abstractmethod
    async def _examined(self, before: Measures) -> None:
        """Prepare the engine for adapters; `before` was measured last before it was reached again."""

    def _facts(self) -> EngineFacts:
        """Return the declared facts, filled with what the server says. A page is one adapter here."""
        declared, found, seen = self._declared, self._found, self._seen
        slots = self._least("device_pages", found.slots)
        host_pages = self._least("host_pages", found.host_pages)
        is_assumed = host_pages is None and self._dialect.host_is_slots
        if found.takes_none:
            self._say_once("%s takes no adapters, so it serves its base model only: %s", self.id, found.takes_none)
        modules = declared.modules
        if modules is not None and found.modules is not None:
            modules = {name: dims for name, dims in modules.items() if name in found.modules}
        return replace(
            declared,
            modules=modules,
            models=(found.served.base,),
            base_only=declared.base_only or bool(found.takes_none),
            unloads=found.unloads or declared.unloads,
            without_lora=bool(found.takes_none),
            rank_max=self._least("rank_max", found.rank_max),
            device_pages=slots,
            host_pages=slots if is_assumed else host_pages,
            host_pages_assumed=is_assumed,
            seats=declared.seats or found.seats,
            kv_tokens=declared.kv_tokens or seen.kv_tokens,
            sequence_tokens_max=declared.sequence_tokens_max or found.served.sequence_tokens_max,
            paths=found.paths,
        )

    def _least(self, key: str, found: int | None) -> int | None:
        """Return the smaller one of what is declared and what was found, and say once if less was found."""
        declared: int | None = getattr(self._declared, key)
        if declared is not None and found is not None and found < declared:
            text = "%s: engine.%s is declared as %s and it was started with %s %s: the smaller number is used"
            self._say_once(text, self.id, key, declared, self._dialect.options.get(key, key), found)
        return min((each for each in (declared, found) if each is not None), default=None)

    def _say_once(self, *said: object) -> None:
        if said not in self._said:
            self._said.add(said)
            logger.warning(*said)

    async def _look(self) -> str | None:
        await self._server.healthy(self._dialect.health_path)
        self.pulse.seen(monotonic())
        if self._rests():
            return None
        before, seen = self._seen, await self._dialect.measures(self._server)
        went_back = self.pulse.counted(seen.steps, monotonic())
        self.pulse.generated(seen.generated, monotonic())
        if went_back or (before.started_at and seen.started_at and seen.started_at != before.started_at):
            self._began_anew()
            return "it has restarted"
        if seen != Measures() or not self._dialect.reading_empties:
            self._seen = seen
        return None

    def _rests(self) -> bool:
        """Return True if the gauges need not be read: at most looks at an engine that has no request of anybody's.

        To read them costs an engine's server and us several times what its health does.
        """
        is_idle = not self._runs and not self._sent and self._seen.inside == 0 and not self._dialect.reading_empties
        self._rested = self._rested + 1 if is_idle and self._rested < RESTS else 0
        return self._rested > 0

    def _began_anew(self) -> None:
        """Take note that the engine was started again."""

    async def _steps(self) -> int | None:
        return (await self._dialect.measures(self._server)).steps

    async def _inside(self) -> int | None:
        return (await self._dialect.measures(self._server)).inside

    def _seen_inside(self) -> int | None:
        return self._seen.inside

    def _seen_generated(self) -> int | None:
        return self._seen.generated

    async def _answers(self, within_s: float) -> bool:
        """Where health is trusted, an error of the engine's own is an answer, too."""
        try:
            status, _ = await self._server.ask(self._dialect.one_token(self._found.served.base), within_s)
        except WireError:
            return False
        return self._dialect.trusts_health or status == HTTPStatus.OK

    async def _look_after(self, text: str) -> None:
        try:
            await self._server.healthy(self._dialect.health_path)
            is_there = self._dialect.trusts_health or await self._answers(self._patience_s)
        except (WireError, Misused):
            is_there = False
        if self._up and not is_there:
            self._lose(text)

    def _measures(self) -> BackendMeasured | None:
        if self._seen.kv_tokens is None:
            return None
        kv_tokens = self._declared.kv_tokens or self._seen.kv_tokens
        return BackendMeasured(self.id, self._declared.seats or self._found.seats, kv_tokens, self._seen.kv_used)

    def _describe(self) -> str:
        return f"reached, {self._found.version}{self._held()}{self._unknown}"

    @abstractmethod
    def _held(self) -> str:
        """Return a phrase for the adapters that it has, with a comma in front."""

    # Runs.

    def _begin(self, effect: Dispatch, ticket: Ticket) -> OpenAiRun:
        form = ticket.payload.head_for(self._dialect.model.name)
        assert isinstance(form, HttpForm), "a request in gRPC's form for an HTTP server"
        return OpenAiRun(
            effect,
            ticket,
            self._naming(effect, form),
            self._dialect.fault_of,
            self._post,
            self._heard,
            self._broke,
            self._run_failed,
            self.follower,
            self._found.body_bytes_max,
        )

    @abstractmethod
    def _naming(self, effect: Dispatch, form: HttpForm) -> Naming:
        """Return how a request names its adapter."""

    def _run_failed(self, fault: Fault) -> None:
        """Take note of what an engine's error says of the engine itself."""

    async def _go(self, run: OpenAiRun, weights: Weights | None) -> None:
        try:
            await run.go(self._client)
        except asyncio.CancelledError:
            self._cut_at_s = monotonic()
            if run.cancelled and self._up:
                await self._end(run)  # until then the engine still runs it, and its adapter takes a slot
            raise

    async def _end(self, run: OpenAiRun) -> None:
        if run.run_id:
            with suppress(WireError):
                await self._dialect.abort(self._server, run.run_id)
        else:
            await self._let_go()

    async def _broke(self, text: str, begun: bool) -> bool:
        """Find out what became of the engine after a run's connection broke, and let it end what it still runs."""
        if await self._wire_broke(text, begun):
            return True
        await self._let_go()
        return not self._up

    @property
    def _was_cut_lately(self) -> bool:
        """True if the server may not have noticed yet that a connection was closed."""
        return monotonic() - self._cut_at_s < (self._dialect.notices_closed_s or 0.0)

    async def _let_go(self) -> None:
        """Return once the engine has ended the requests whose connections were closed before.

        A server that asks from time to time whether a client is still there tells its engine late, which hears of it
        between two steps. A request of ours that is sent after that, and answered, has been through a step without
        them, however long its steps take.
        """
        notices_s = self._dialect.notices_closed_s
        if notices_s is None:
            return
        closed_s = monotonic()
        await asyncio.sleep(notices_s)
        async with self._stepping:
            if self._stepped_since_s < closed_s + notices_s:
                sent_s = monotonic()
                if await self._answers(self._patience_s):
                    self._stepped_since_s = sent_s

    def _was_lost(self) -> None:
        self._distrusted = True
        self._cut_at_s = monotonic()

    async def _leave(self) -> None:
        await self._client.close()

    # Loads.

    def _path(self, key: str) -> str:
        """Return the engine's path of a version's files; "" if its weights are sent."""
        shared_dir = self._entry.shared_dir
        return "" if shared_dir is None else str(shared_dir.engine_path(key))

    @staticmethod
    def _is_late(error: Exception) -> bool:
        return isinstance(error, TimedOut)


def content_name(effect: Load | Dispatch) -> str:
    """Return a name that is the same for all versions of one name with one content."""
    return f"{effect.name}@{effect.digest[:DIGEST_CHARACTERS]}"


def version_name(effect: Load | Dispatch) -> str:
    """Return the engine's name for a version. A version that was registered again has another one."""
    key = effect.packed.key if isinstance(effect, Load) else effect.packed_key
    generation = key.rpartition(".g")[2]
    suffix = "" if generation == "0" else f".g{generation}"
    return f"{content_name(effect)}{suffix}"
