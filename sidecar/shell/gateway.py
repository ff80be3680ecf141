"""The process as its fronts see it: submit requests, and act for operators.

It owns the driver, and carries out the core's effects with the tickets of requests, the host store and the backends
(`fleet`). `catalogue` has what operators do with names.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, monotonic_ns, time
from typing import Any

from sidecar.access.access import Access, Caller, Permit
from sidecar.access.budgets.counting import PromptCounter
from sidecar.access.usage.meter import UNKNOWN
from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.packed import PackReport
from sidecar.adapters.shared_memory import Mount
from sidecar.adapters.staging import Staging
from sidecar.backends.api import Backend, Charged, Payload, Ticket, Traced
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config import identities
from sidecar.config.identities import checked, clipped
from sidecar.core import admission, injected
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.causes import Cause, ReadTooSlowly, Said
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core, Policies, cut_off, why_left
from sidecar.core.enums import Fault, Outcome, Phase, outcome_of
from sidecar.core.facts import EngineFacts, version_of_key
from sidecar.core.state import Name, State
from sidecar.errors import Misused, Reason, Refused, SidecarError
from sidecar.journal.raised import Raised
from sidecar.model.reference import BASE_NAMES, Reference
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.chronicle import Chronicle
from sidecar.shell.crash import Crash, last_ending
from sidecar.shell.driver import Driver, Observer
from sidecar.shell.fit import SharedNames
from sidecar.shell.fleet import Added, Fleet
from sidecar.shell.flow import Lanes
from sidecar.shell.made import Made
from sidecar.shell.request_log import log_refused
from sidecar.shell.requests import Elsewhere, RequestFacts
from sidecar.shell.sources import Sources
from sidecar.shell.store import BlobStore
from sidecar.shell.trial import Trial
from sidecar.shell.weights_check import WeightsCheck
from sidecar.state.records import check_not_paused
from sidecar.state.registry import Registry
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

STALL_CHECK_S = 1.0
EARLIER_S_MAX = 3600.0
"""How long files of an earlier process may stay: no answer takes so long."""
ABANDON_S = TOLD_S = 1.0
"""Time that a crashed process gives its engines, and its clients; for everything it has `cli.serving.CRASH_S`."""


class Gateway:
    """One sidecar process without its listeners."""

    def __init__(
        self,
        config: CoreConfig,
        policies: Policies,
        registry: Registry,
        roots: Sequence[Path],
        client_stall_s: float = 60.0,
        inbox_max: int = 10_000,
        sources: Sources | None = None,
        disk: DiskTier | None = None,
        bases: Mapping[str, BaseModel] | None = None,
        mount: Mount | None = None,
        stagings: Sequence[Staging] = (),
        crash: Crash | None = None,
        answers: AnswerBuffers | None = None,
        access: Access | None = None,
        check: WeightsCheck | None = None,
    ) -> None:
        self.access = access or Access.off(registry.get)
        self.crash = crash or Crash()
        self.core = Core(config, policies)
        self.driver = Driver(self.core, monotonic_ns, self._run, (), inbox_max, self.crash, self._counted)
        self.sources = sources or Sources(AllowList.of(roots=roots))
        self.catalogue = Catalogue(registry, lambda: self.core.state, self.driver.step, self.sources, bases or {})
        self.fleet = Fleet(self.driver, check or WeightsCheck("off"))
        self.backends = self.fleet.backends
        self.elsewhere: Elsewhere | None = None
        """The router to the other replicas, if there are any."""
        self.writers: dict[str, Callable[[], bool]] = {}
        """What is written to disk or to a Redis, and whether that fails now."""
        self._disk = disk
        self.store = BlobStore(
            self.driver.post,
            self.sources,
            disk,
            config.fetches_max,
            mount,
            self._forget_region,
            config.store_bytes,
            stagings,
        )
        self.answers = answers or AnswerBuffers()
        self.tickets: dict[int, Ticket] = {}
        self.counter: PromptCounter | None = None
        """Counts prompts in text, if a tokenizer is configured."""
        self.estimated: set[int] = set()
        """The requests of this replica's core whose prompts nothing has counted."""
        self._left: dict[int, Ticket] = {}
        """Requests whose clients have left, until the core tells what they have cost."""
        self._numbers = itertools.count(1)
        self.made = Made()
        self._asks: dict[int, asyncio.Future[do.Answer]] = {}
        self._client_stall_ns = int(client_stall_s * 1e9)
        self._tasks = Tasks()
        self.lanes = Lanes(lambda: self.core.state)
        self.chronicle = Chronicle(lambda: self.core.state, self._ticket_of, waited_ns=self.driver.waited_ns)
        self.driver.observe(self.chronicle, of_refused=True)
        self.driver.observe(SharedNames(self.core.state))
        self.begin_trace: Callable[[Ticket, RequestFacts], Traced] | None = None
        """Begins the trace of a request; None if nothing is traced."""
        self._is_outlived = False
        """Engines go on with answers after this process: those that a proxy carries."""

    @property
    def state(self) -> State:
        """The core's state. Read it between steps only, and never change it."""
        return self.core.state

    @property
    def takes_requests(self) -> bool:
        """True if a request could be sent to some backend now, by this replica or another one."""
        if self.crash.raised is not None:
            return False
        if self.elsewhere is not None and self.elsewhere.takes_requests:
            return True
        return any(backend.takes_requests for backend in self.state.backends.values())

    def serves(self, backend: str) -> bool:
        """Return True if requests are sent to a backend now, by this replica or another one."""
        if self.elsewhere is not None:
            return self.elsewhere.serves(backend)
        known = self.state.backends.get(backend)
        return known is not None and known.takes_requests

    def observe(self, observer: Observer, of_refused: bool = False, of_core: bool = False) -> None:
        """Show an observer every step, as `Driver.observe` does."""
        self.driver.observe(observer, of_refused, of_core)

    async def start(self, backends: Sequence[tuple[Backend, EngineFacts]]) -> None:
        """Tell the core of all names, spilled weights and backends, and begin to reach the backends."""
        await self.store.open()
        engines = [(backend.id, facts) for backend, facts in backends]
        self.catalogue.announce(Trial(self.core.state.config, self.core.policies, engines))
        if self._disk is not None:
            for key, size_bytes in await asyncio.to_thread(self._disk.scan):
                self.driver.step(ev.DiskHolds(key, version_of_key(key), size_bytes))
        for backend, facts in backends:
            self.fleet.add(backend, facts, self.elsewhere is None)
        for backend, _ in backends:
            await self.fleet.start(backend)
        self._tasks.spawn(self._sweep())
        self._tasks.spawn(self.chronicle.watch())
        if self.store.folders:
            self._tasks.spawn(self._clear_folders())

    async def add_backend(self, backend: Backend, facts: EngineFacts, pool: str = "", fresh: bool = True) -> None:
        """Add a backend and begin to reach it; `fresh` says that its engine is new."""
        self.fleet.add(backend, facts, self.elsewhere is None, pool, fresh)
        await self.fleet.start(backend)

    async def remove_backend(
        self, backend: str, cause: str, successor: Callable[[], tuple[Backend, EngineFacts] | None] = lambda: None
    ) -> None:
        """Remove a backend; `successor` returns the one that has its id from then on, which its caller starts."""

        def after() -> Added | None:
            made = successor()
            return None if made is None else Added(*made, owned=self.elsewhere is None)

        await self.fleet.remove(backend, cause, after)

    def configure(
        self, config: CoreConfig, bases: Mapping[str, BaseModel], stagings: Sequence[Staging], inbox_max: int
    ) -> None:
        """Take another configuration while requests run. `stagings` are open folders besides those in use."""
        self.catalogue.bases = bases
        self.store.add_folders(stagings)
        if stagings:
            self._tasks.spawn(self._clear_folders())
        self.driver.inbox_max = inbox_max
        if config != self.state.config:
            self.driver.step(ev.ConfigChanged(config))

    async def drain(self) -> None:
        """Admit nothing new, and wait until all requests have ended."""
        self.driver.post(ev.ShutdownBegun())
        while self.crash.raised is None and (not self.state.draining or self.state.requests or self.tickets):
            await asyncio.sleep(0.02)

    async def cut_off(self) -> bool:
        """End every open request because the process stops, and return True if there was one."""
        self._is_outlived = self._goes_on()
        tickets = [ticket for ticket in self.tickets.values() if ticket.settled is None]
        for ticket in tickets:
            begun = ticket.came is not None
            moves = ticket.caller is None and not begun  # the replica that passed it on looks for another owner
            self._end(ticket, ev.ClientLeft(ticket.request, moves, shut_down=True), *cut_off(begun))
        await self.told()
        return bool(tickets)

    async def stop(self) -> None:
        self._is_outlived = self._is_outlived or self._goes_on()
        await self._stop_backends()
        self.driver.stop()
        self.sources.close()
        self.store.close(as_dead=self._is_outlived)

    def _goes_on(self) -> bool:
        """Return True if engines have requests that a stop of this process does not end."""
        carried = any(request.unseen for request in self.state.requests.values())
        return carried or any(each.owned and each.others for each in self.state.backends.values())

    async def _stop_backends(self) -> None:
        await self._tasks.stop()
        await self.fleet.stop()

    # After a crash.

    async def abandon(self) -> None:
        """Cancel all that engines run, within `ABANDON_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ABANDON_S):
                await self._stop_backends()

    def end_open(self, raised: Raised) -> None:
        """End every open request by what is known of it, and every open question of an operator."""
        endings = []
        for ticket in list(self.tickets.values()):
            if ticket.settled is None:
                owners = () if self.elsewhere is None else self.elsewhere.ended_with(ticket)
                ending = last_ending(ticket, raised, self.state, owners)
                ticket.settle(ending)
                if ticket.caller is None and ending.reason is Reason.CRASHED:  # the replica that passed it on goes on
                    self.chronicle.given_up(ending)
                else:
                    endings.append(admission.with_name(self.state, ending, ticket.facts.adapter))
        for future in self._asks.values():
            if not future.done():
                future.set_exception(self.crash.error())
        if self.elsewhere is not None:
            self.elsewhere.abandon()
        self.driver.show_endings(endings)

    async def told(self) -> None:
        """Return when all clients have been told of their endings, after `TOLD_S` at the latest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TOLD_S):
                while self.tickets:
                    await asyncio.sleep(0.01)

    # Requests.

    def submit(
        self,
        facts: RequestFacts,
        payload: Payload,
        client_id: str,
        caller: Caller,
        text: str | None = None,
        permit: Permit | None = None,
    ) -> Ticket:
        """Submit a caller's request under its client's id, and return its ticket.

        `text` is the prompt, if it is one text that its engine may not count for us; `permit` what `permit` returned,
        if the front has asked.
        Raises Refused if the queue is full, a name is malformed or the caller may not use it, and
        Misused(UNAUTHENTICATED) if its credential has ended. Every other ending comes through the ticket.
        """
        facts.check()
        try:
            self._complete(facts, client_id, caller, permit)
        except SidecarError as error:
            name = UNKNOWN if admission.name_in(self.state, facts.adapter) else ""
            self.show_refused(name, facts.tenant, facts.klass, facts.input_tokens, error)
            raise
        ticket = Ticket(next(self._numbers), payload, client_id, self.answers)
        ticket.caller, ticket.peer = caller, caller.peer
        try:
            ticket.reservation = self._reserved(facts, client_id, caller)
            self._take(facts, ticket, self.admit if self.elsewhere is None else self.elsewhere.submit)
        except SidecarError as error:
            if ticket.reservation is not None:
                ticket.reservation.settle(0, False, None)
            name = admission.name_in(self.state, facts.adapter)
            self.show_refused(name, facts.tenant, facts.klass, facts.input_tokens, error)
            raise
        if text is not None and self.counter is not None:
            ticket.counting = self.counter.count(self._base_model(facts.adapter), text, ticket.counted)
        return ticket

    def _name(self, reference: str) -> Name | None:
        return self.state.names.get(Reference.of(reference).name)

    def _base_model(self, adapter: str) -> str:
        """Return the base model of an adapter; "" for the base model itself, whichever it is."""
        name = self._name(adapter)
        return "" if name is None else self.state.versions[name.digest].adapter.base_model

    def _reserved(self, facts: RequestFacts, client_id: str, caller: Caller) -> Charged | None:
        """Reserve what a request may cost. Raises Refused if its tenant has spent its budget."""
        length = facts.output_tokens_max if facts.has_length else None
        return self.access.reserve(
            caller, facts.tenant, facts.klass, facts.adapter, facts.input_tokens, length, facts.is_estimated,
            facts.sequences, client_id,
        )  # fmt: skip

    def _complete(self, facts: RequestFacts, client_id: str, caller: Caller, permit: Permit | None) -> None:
        """Complete a request as the caller may make it. Raises Refused, Misused(UNAUTHENTICATED)."""
        access, name = self.access, facts.adapter
        klass = access.class_of(caller, facts.klass)
        if permit is None:
            is_base = name in BASE_NAMES and name not in self.state.names
            permit = access.permit(caller, name, client_id, is_base, facts.tenant)
        record = self.catalogue.registry.get(Reference.of(name).name)
        is_visible = record is not None and (permit.versions is not None or record.is_for(facts.tenant))
        if record is not None and is_visible and facts.versions is None:  # else it is a question of our own
            check_not_paused(record, time())
        facts.klass, facts.versions = klass, facts.versions if permit.versions is None else permit.versions

    def salt(self, tenant: str, own: str = "") -> str | None:
        """Return the salt of a request's prefix blocks, `own` being the client's; None to leave them as they are."""
        return None if self.access.salts is None else self.access.salts.of(tenant, own)

    def permit(self, caller: Caller, reference: str, request_id: str, is_base: bool, tenant: str) -> Permit:
        """Return what `access.permit` does, or raise as it does and show the refusal.

        Fronts ask before they look for engines: what these can answer would tell that a name is there.
        """
        try:
            return self.access.permit(caller, reference, request_id, is_base, tenant)
        except SidecarError as error:
            name = "" if is_base else UNKNOWN
            self.show_refused(name, caller.principal.tenant, caller.principal.klass, 0, error)
            raise

    def show_refused(self, name: str, tenant: str, klass: str, input_tokens: int, error: SidecarError) -> None:
        """Show a request that was not taken to those who count, once; `name` is UNKNOWN of one that may not be told."""
        if error.is_counted:
            return
        error.is_counted, klass = True, self._class_shown(klass)
        ending = do.Settle(
            0, Outcome.REFUSED, name, tenant, klass, 0, input_tokens, reason=error.reason, cause=Said(error.message)
        )
        self.driver.show_endings([ending])

    def turned_away(self, request_id: str, error: SidecarError, caller: Caller | None = None) -> None:
        """Log and show a request that a front refuses, with what is known of it: at most who sends it."""
        log_refused(request_id, error)
        self.show_refused(UNKNOWN, "" if caller is None else caller.principal.tenant, "default", 0, error)

    def _class_shown(self, klass: str) -> str:
        return klass if klass in self.state.config.classes else "default"

    def submit_here(self, facts: RequestFacts, ticket_of: Callable[[int], Ticket]) -> Ticket:
        """Submit a request that another replica has passed on; `ticket_of(number)` makes its ticket.

        That replica has asked who sends it and what it may use: its word comes by mutual TLS.
        """
        facts.check()
        return self._take(facts, ticket_of(next(self._numbers)), self.admit)

    def _take(self, facts: RequestFacts, ticket: Ticket, admit: Callable[[Ticket, RequestFacts], None]) -> Ticket:
        if self.crash.raised is not None:
            raise self.crash.refused()
        checked(identities.REQUEST_ID, ticket.client_id)
        self.tickets[ticket.request], ticket.facts = ticket, facts
        if self.begin_trace is not None:
            ticket.trace = self.begin_trace(ticket, facts)
        try:
            admit(ticket, facts)
        except Refused:
            del self.tickets[ticket.request]
            raise
        return ticket

    def admit(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Give a request to this replica's core. Raises Refused if the queue is full."""
        deadline_ns = None if facts.deadline_s is None else monotonic_ns() + int(facts.deadline_s * 1e9)
        self.driver.post(facts.received(ticket.request, deadline_ns, ticket.client_id), facts.waited_ns)
        if facts.is_estimated:
            self.estimated.add(ticket.request)

    def prompt_tokens(self, request: int) -> int | None:
        """Return the tokens of an open request's prompt as they were counted since it came, None if they were not."""
        ticket = self._ticket_of(request)
        return None if ticket is None else ticket.prompt_tokens

    def _counted(self, ending: do.Settle) -> do.Settle:
        ticket, request = self._ticket_of(ending.request), self.state.requests.get(ending.request)
        most = request.view.output_tokens_max if request is not None and request.running else 0
        return ending if ticket is None else self.made.counted(ending, ticket, most)

    def _ticket_of(self, request: int) -> Ticket | None:
        return self.tickets.get(request) or self._left.get(request)

    def admit_again(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Admit a request that was given back. The core gets it under a new number."""
        self._renumber(ticket)
        self.admit(ticket, facts)

    def withdraw(self, ticket: Ticket) -> None:
        """Take a waiting request back from this replica's core."""
        number = ticket.request
        self._renumber(ticket)
        self.driver.tell(ev.ClientLeft(number, moved=True))

    def _renumber(self, ticket: Ticket) -> None:
        old = ticket.request
        del self.tickets[old]
        ticket.request = next(self._numbers)
        self.tickets[ticket.request] = ticket
        self.chronicle.renumbered(old, ticket.request)

    def end_here(
        self, ticket: Ticket, facts: RequestFacts, reason: Reason | None, cause: Cause | None, backend: str = ""
    ) -> None:
        """End a request that neither this replica's core nor another replica ends: it is logged and counted here."""
        self.end_by(ticket, self.ending_of(ticket, facts, reason, cause, backend))

    def end_by(self, ticket: Ticket, ending: do.Settle) -> None:
        """End a request as `end_here` does, by an ending that more is known of."""
        ticket.settle(ending)
        self.chronicle.ended_here(ticket)
        self.driver.show_endings([ending])

    def ending_of(
        self, ticket: Ticket, facts: RequestFacts, reason: Reason | None, cause: Cause | None, backend: str = ""
    ) -> do.Settle:
        """Return the ending of a request that was passed on, by what is known here."""
        dispatch = ticket.dispatch
        ending = do.Settle(
            ticket.request,
            outcome_of(reason),
            admission.name_in(self.state, facts.adapter),
            facts.tenant,
            self._class_shown(facts.klass),
            facts.waited_ns if dispatch is None else dispatch.queue_ns,
            facts.input_tokens,
            ticket.tokens,
            reason,
            cause,
            backend if dispatch is None else dispatch.backend,
            "" if dispatch is None else dispatch.digest,
        )
        most = ticket.length_max * facts.sequences if ticket.length_max else facts.output_tokens_max
        return self.made.counted(ending, ticket, most if ticket.dispatched_ns else 0)

    def close(self, ticket: Ticket, moved: bool = False) -> None:
        """Release a ticket. If its request has not ended, its client has left, or (`moved`) another replica has it."""
        ticket.drop()
        if self.tickets.pop(ticket.request, None) is not None and ticket.settled is None:
            self._left[ticket.request] = ticket
            self._cancel(ticket, ev.ClientLeft(ticket.request, moved))

    def cancel(self, ticket: Ticket, by_operator: bool = False) -> None:
        """End a request as its client or an operator asks; the ending comes through the ticket."""
        self._cancel(ticket, ev.ClientLeft(ticket.request, by_operator=by_operator))

    def _cancel(self, ticket: Ticket, event: ev.ClientLeft) -> None:
        self._end(ticket, event, Reason.CANCELLED, why_left(event))

    def _end(self, ticket: Ticket, event: ev.Event, reason: Reason, cause: Cause) -> None:
        if self.elsewhere is None or not self.elsewhere.end(ticket, reason, cause):
            self.driver.post(event)
        else:
            self._left.pop(ticket.request, None)

    async def _clear_folders(self) -> None:
        """Remove what earlier processes left for engines, once none can be reading it for their answers."""
        until_s = monotonic() + EARLIER_S_MAX
        while self._is_read_for_others() and monotonic() < until_s:
            await asyncio.sleep(STALL_CHECK_S)
        await self.store.sweep_folders()
        await asyncio.gather(*(backend.files_removed() for backend in self.backends.values()))

    def _is_read_for_others(self) -> bool:
        """Return True while an engine that reads files has requests that others sent, or may have some."""
        engines = [backend for backend in self.state.backends.values() if backend.facts.reads_files]
        return not engines or any(each.others or each.phase is not Phase.UP for each in engines)

    async def _sweep(self) -> None:
        """Once a second: cancel requests whose clients have been too far behind for too long, and drop old sources."""
        while True:
            await asyncio.sleep(min(STALL_CHECK_S, self._client_stall_ns / 4e9))
            self.lanes.sample()
            self.catalogue.forget_unneeded()
            self._cancel_stalled()

    def _cancel_stalled(self) -> None:
        # not in the loop above: its frame would keep the last ticket
        now_ns, over = monotonic_ns(), self.access.ended()
        for ticket in list(self.tickets.values()):
            is_open = ticket.caller is not None and ticket.settled is None
            if is_open and over(ticket.caller, ticket.dispatch is not None):
                self._cancel(ticket, ev.ClientLeft(ticket.request, revoked=True))
                continue
            since_ns = ticket.behind_since_ns
            if since_ns is None or ticket.settled is not None:
                continue
            if now_ns - since_ns > self._client_stall_ns:
                self._end(ticket, ev.ClientStalled(ticket.request), Reason.CLIENT_STALLED, ReadTooSlowly())
            else:
                ticket.resume()  # other answers may have left room

    # Effects.

    def _run(self, effect: do.Effect) -> None:
        if self.state.config.raise_on:
            injected.check(self.state.config.raise_on, effect, self.state)
        _EFFECTS[type(effect)](self, effect)

    def _fetch(self, effect: do.Fetch) -> None:
        self.store.fetch(effect)

    def _drop(self, effect: do.Drop) -> None:
        self.store.drop(effect)

    async def _forget_region(self, region: str) -> None:
        await asyncio.gather(*(backend.forget(region) for backend in self.backends.values()))

    def _spill(self, effect: do.Spill) -> None:
        self.store.spill(effect)

    def _drop_disk(self, effect: do.DropDisk) -> None:
        self.store.drop_disk(effect)

    def _load(self, effect: do.Load) -> None:
        if self._has_lost(effect.backend):
            self.driver.post(ev.LoadFailed(effect.load, Fault.NOT_OWNED, ""))
            return
        self.backends[effect.backend].load(effect, self.store.lease(effect.packed.key))

    def _has_lost(self, backend: str) -> bool:
        return self.elsewhere is not None and not self.elsewhere.may_dispatch(backend)

    def _dispatch(self, effect: do.Dispatch) -> None:
        if self._has_lost(effect.backend):
            self.driver.post(ev.RunFailed(effect.request, effect.attempt, Fault.NOT_OWNED, ""))
            return
        ticket = self.tickets.get(effect.request)
        if ticket is None:  # its client has just left; that event is next
            self.driver.post(ev.RunEnded(effect.request, effect.attempt, 0))
            return
        self.goes_to(ticket, effect.backend)
        ticket.dispatched(effect)
        weights = self.store.lease(effect.packed_key) if effect.attach else None
        self.backends[effect.backend].run(effect, ticket, weights)

    def goes_to(self, ticket: Ticket, backend: str) -> None:
        """Note how the engine answers that a request is sent to, and how long at most, if it cuts the answer short."""
        ticket.is_whole = not self.fleet.streams(backend) or ticket.payload.is_whole(self.fleet.kind_of(backend))
        facts, known = ticket.facts, self.state.backends.get(backend)
        longest = None if known is None else known.facts.sequence_tokens_max
        if longest is not None and facts.has_length:
            room = max(1, longest - (0 if facts.is_estimated else facts.input_tokens))
            ticket.length_max = room if facts.output_tokens_max > room * facts.sequences else None

    def _cancel_run(self, effect: do.CancelRun) -> None:
        self.backends[effect.backend].cancel(effect.request, effect.attempt)

    def _register_regions(self, effect: do.RegisterRegions) -> None:
        self.backends[effect.backend].register_regions()

    def _probe(self, effect: do.Probe) -> None:
        self.backends[effect.backend].probe(effect.within_ns / 1e9)

    def _settle(self, effect: do.Settle) -> None:
        self.estimated.discard(effect.request)
        ticket, left = self.tickets.get(effect.request), self._left.pop(effect.request, None)
        self.made.learn(ticket or left, effect)
        if ticket is None:
            self.chronicle.given_up(effect)
            if left is not None and left.reservation is not None:
                left.settle(effect)
            return
        if effect.reason is not Reason.NOT_OWNER or self.elsewhere is None or not self.elsewhere.given_back(ticket):
            self.chronicle.given_up(effect)
            ticket.settle(self.for_client(effect, ticket))

    def for_client(self, ending: do.Settle, ticket: Ticket) -> do.Settle:
        """Return an ending in words that its client may read."""
        hidden = self.access.for_client(ticket.caller, ending.reason, ending.name, ticket.client_id)
        if hidden is None:
            return admission.for_client(self.state, ending)
        return replace(ending, reason=hidden.reason, cause=Said(hidden.message), name=hidden.details["adapter"])

    def _answer(self, effect: do.Answer) -> None:
        future = self._asks.pop(effect.ask, None)
        if future is not None and not future.done():
            future.set_result(effect)

    def _note(self, effect: do.Effect) -> None:
        """Do nothing: this effect is for observers."""

    # Operators.

    async def evict(self, name: str) -> do.Answer:
        self.catalogue.known(name)
        return await self._ask(lambda ask: ev.EvictAsked(ask, name))

    async def prefetch(self, name: str, backends: Sequence[str]) -> do.Answer:
        self.catalogue.known(name)
        for backend in backends:
            self.known_backend(backend)
        return await self._ask(lambda ask: ev.PrefetchAsked(ask, name, tuple(backends)))

    async def _ask(self, event: Callable[[int], ev.Event]) -> do.Answer:
        ask = next(self._numbers)
        if self.crash.raised is not None:
            raise self.crash.error()
        future: asyncio.Future[do.Answer] = asyncio.get_running_loop().create_future()
        self._asks[ask] = future
        self.driver.post(event(ask))
        return await future

    def set_drain(self, backend: str, draining: bool) -> int:
        """Drain a backend or end that; return how many requests were refused, for nothing else can serve them."""
        self.known_backend(backend)
        effects = self.driver.step(ev.DrainSet(backend, draining))
        return sum(isinstance(each, do.Settle) and each.reason is Reason.NO_BACKEND for each in effects)

    def known_backend(self, backend: str) -> Any:
        """Return a backend's state in the core. Raises Misused naming the configured ones."""
        found = self.state.backends.get(backend)
        if found is None:
            unknown, configured = clipped(backend), ", ".join(self.state.backends) or "none"
            raise Misused(Reason.UNKNOWN_BACKEND, f'no backend is called "{unknown}"; configured: {configured}')
        return found

    def on_packed(self, callback: Callable[[str, PackReport], None]) -> None:
        def packed(key: str, report: PackReport) -> None:
            self.chronicle.packed(key, report.pack_ns)
            callback(key, report)

        self.store.on_packed = packed


_EFFECTS: dict[type, Callable[[Gateway, Any], None]] = {
    do.Fetch: Gateway._fetch,
    do.Drop: Gateway._drop,
    do.Spill: Gateway._spill,
    do.DropDisk: Gateway._drop_disk,
    do.Load: Gateway._load,
    do.Dispatch: Gateway._dispatch,
    do.CancelRun: Gateway._cancel_run,
    do.RegisterRegions: Gateway._register_regions,
    do.Probe: Gateway._probe,
    do.Settle: Gateway._settle,
    do.Answer: Gateway._answer,
    do.Heal: Gateway._note,
    do.Quarantine: Gateway._note,
}
