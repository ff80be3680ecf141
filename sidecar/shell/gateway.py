"""The process as its fronts see it: submit a request, ask the operators' questions, look at the queue.

It owns the driver and carries out the core's effects: tickets for requests, the blob store, the backends, the
registry.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any, Protocol

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.packed import PackReport
from sidecar.adapters.shared_memory import Mount
from sidecar.adapters.staging import Staging
from sidecar.backends.api import Backend, Payload, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config import identities
from sidecar.config.identities import checked
from sidecar.core import admission, injected
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core, Policies
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts, version_of_key
from sidecar.core.state import State
from sidecar.errors import Misused, Reason, Refused
from sidecar.journal.raised import Raised
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.crash import Crash, last_ending
from sidecar.shell.driver import Driver, Observer
from sidecar.shell.sources import Sources
from sidecar.shell.store import BlobStore
from sidecar.shell.trial import Trial
from sidecar.state.registry import Registry

logger = logging.getLogger(__name__)

STALL_CHECK_S = 1.0
ABANDON_S = TOLD_S = 1.0
"""A process that has crashed gives its engines and its clients so long; all in all it has `cli.serving.CRASH_S`."""
REMOVED_KEPT_MAX = 1024
"""Backends that are gone of which it is still known what they were: an answer of theirs may still be on its way."""
LEASE_ENDED = "this replica's lease had ended before the request was sent; send it again"


COUNT_MAX = 1 << 28
"""Tokens or sequences of a request: more than any engine gives. A client may write any number."""


@dataclass(frozen=True)
class RequestFacts:
    """What the core must know of a request; `deadline_s` is counted from now.

    A count above COUNT_MAX is as good as that: it is added up, sent to other replicas and written to the journal.
    """

    adapter: str
    tenant: str = ""
    klass: str = "default"
    input_tokens: int = 0
    output_tokens_max: int = 0
    deadline_s: float | None = None
    session: str = ""
    size_bytes: int = 0
    """The length of the client's message."""
    only: tuple[str, ...] = ()
    """The backends that it may go to; any if none is named."""
    sequences: int = 1
    """How many sequences it makes its engine run."""

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens_max", "sequences"):
            object.__setattr__(self, name, min(getattr(self, name), COUNT_MAX))

    def check(self) -> None:
        """Raise Refused(INVALID_REQUEST) for what is not as it may be, whatever front it came by."""
        checked(identities.ADAPTER, self.adapter)
        checked(identities.TENANT, self.tenant)
        checked(identities.CLASS, self.klass)
        checked(identities.SESSION, self.session)

    def received(self, request: int, deadline_ns: int | None, client_id: str = "") -> ev.Received:
        """Return what the core is told of it."""
        return ev.Received(
            request, self.adapter, self.tenant, self.klass, self.input_tokens, self.output_tokens_max, deadline_ns,
            self.session, self.size_bytes, self.only, self.sequences, client_id,
        )  # fmt: skip


class Elsewhere(Protocol):
    """What knows of the other replicas: a request may go to one of them, or come back to be sent to another."""

    def submit(self, ticket: Ticket, facts: RequestFacts) -> None:
        """See to a request, here by `Gateway.admit` or elsewhere. Raises Refused when the inbox is full."""

    @property
    def may_dispatch(self) -> Callable[[str], bool]:
        """Whether this replica owns a backend in this very moment: asked right before every write to it."""

    @property
    def takes_requests(self) -> bool:
        """Whether another replica would take a request now."""

    def given_back(self, ticket: Ticket) -> bool:
        """Whether it sees to a request that this replica's core has given back without a token."""

    def end(self, ticket: Ticket, reason: Reason) -> bool:
        """End a request that is elsewhere, its ending through the ticket; False if it is here."""

    def ended_with(self, ticket: Ticket) -> Sequence[str]:
        """Return the replicas that ended while they had a request."""

    def abandon(self) -> None:
        """Let go of all requests that are elsewhere; each has its ending."""


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
    ) -> None:
        self.crash = crash or Crash()
        self.core = Core(config, policies)
        self.driver = Driver(self.core, monotonic_ns, self._run, inbox_max=inbox_max, crash=self.crash)
        self.sources = sources or Sources(AllowList.of(roots=roots))
        self.catalogue = Catalogue(registry, lambda: self.core.state, self.driver.step, self.sources, bases or {})
        self.backends: dict[str, Backend] = {}
        self._stopping: set[Backend] = set()
        self.elsewhere: Elsewhere | None = None
        """The other replicas, if there are any."""
        self._kinds: dict[str, tuple[str, bool]] = {}
        """Of backends that are gone: the kind of engine, and whether it answered token by token."""
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
        self._numbers = itertools.count(1)
        self._asks: dict[int, asyncio.Future[do.Answer]] = {}
        self._client_stall_ns = int(client_stall_s * 1e9)
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """The core's state, to be read between steps only."""
        return self.core.state

    @property
    def takes_requests(self) -> bool:
        """Whether some backend could be sent a request now, here or by another replica."""
        if self.crash.raised is not None:
            return False
        if self.elsewhere is not None and self.elsewhere.takes_requests:
            return True
        return any(backend.takes_requests for backend in self.state.backends.values())

    def observe(self, observer: Observer, at_the_door: bool = False) -> None:
        self.driver.observe(observer, at_the_door)

    async def start(self, backends: Sequence[tuple[Backend, EngineFacts]]) -> None:
        """Tell the core what there is, and begin to reach the backends."""
        await self.store.open()
        engines = [(backend.id, facts) for backend, facts in backends]
        self.catalogue.announce(Trial(self.core.state.config, self.core.policies, engines))
        if self._disk is not None:
            for key, size_bytes in await asyncio.to_thread(self._disk.scan):
                self.driver.step(ev.DiskHolds(key, version_of_key(key), size_bytes))
        for backend, facts in backends:
            self._add(backend, facts)
        for backend, _ in backends:
            await backend.start(self._ear_for(backend))
        self._sweeper = asyncio.create_task(self._sweep())

    # Backends that come and go.

    async def add_backend(self, backend: Backend, facts: EngineFacts, pool: str = "", fresh: bool = True) -> None:
        """Take in a backend, and begin to reach it. No other is called by its id; `fresh`: its engine is new."""
        self._add(backend, facts, pool, fresh)
        await backend.start(self._ear_for(backend))

    def _add(self, backend: Backend, facts: EngineFacts, pool: str = "", fresh: bool = False) -> None:
        assert backend.id not in self.backends, f"{backend.id} is there already"
        self.backends[backend.id] = backend
        self.driver.step(ev.BackendAdded(backend.id, facts, self.elsewhere is None, pool, fresh))

    def set_leaving(self, backend: str, leaving: bool) -> None:
        """Send nothing new to a backend that is about to go, or take it back."""
        self.driver.step(ev.BackendLeaving(backend, leaving))

    async def remove_backend(self, backend_id: str, cause: str) -> None:
        """Forget a backend that is gone. What still runs there is cut off; what has no token yet is sent elsewhere."""
        backend = self.backends[backend_id]
        self.set_leaving(backend_id, True)
        self._kinds[backend_id] = self._kind_now(backend_id)
        if len(self._kinds) > REMOVED_KEPT_MAX:
            del self._kinds[next(iter(self._kinds))]
        self._stopping.add(backend)
        try:
            await backend.stop()  # first: none of its runs may deliver anything once the core has sent it elsewhere
        finally:
            self._stopping.discard(backend)
            self.driver.tell(ev.BackendRemoved(backend_id, cause))
            del self.backends[backend_id]

    def _ear_for(self, backend: Backend) -> Callable[[ev.Event], None]:
        """Return what a backend posts by for as long as it is one of ours.

        Runs that are cut off end in ways that look like others: of them only that a token came counts.
        """

        def post(event: ev.Event) -> None:
            is_ours = self.backends.get(backend.id) is backend
            if is_ours and (backend not in self._stopping or isinstance(event, ev.FirstToken)):
                self.driver.post(event)

        return post

    def kind_of(self, backend: str) -> str:
        """Return the kind of engine that an answer came from, which may be gone meanwhile."""
        return self._kind(backend)[0]

    def streams(self, backend: str) -> bool:
        """Whether such an engine answers token by token."""
        return self._kind(backend)[1]

    def streamed(self, kind: str) -> bool:
        """Whether the last engine of a kind that is gone answered token by token; taken to be where none was there."""
        return next((streams for other, streams in reversed(self._kinds.values()) if other == kind), True)

    def _kind(self, backend: str) -> tuple[str, bool]:
        return self._kind_now(backend) if backend in self.backends else self._kinds[backend]

    def _kind_now(self, backend: str) -> tuple[str, bool]:
        return self.state.backends[backend].facts.kind, self.backends[backend].streams

    async def drain(self) -> None:
        """Admit nothing new and wait until all that is here has ended."""
        self.driver.post(ev.ShutdownBegun())
        while self.crash.raised is None and (not self.state.draining or self.state.requests or self.tickets):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self._stop_backends()
        self.driver.stop()
        self.sources.close()
        self.store.close()

    async def _stop_backends(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*(backend.stop() for backend in self.backends.values()))

    # A process that has crashed.

    async def abandon(self) -> None:
        """Cancel all that engines run, within `ABANDON_S`: nothing comes of it any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ABANDON_S):
                await self._stop_backends()

    def end_open(self, raised: Raised) -> None:
        """End what is open, each request by what is known of it, and every operator's question."""
        endings = []
        for ticket in list(self.tickets.values()):
            if ticket.settled is None:
                owners = () if self.elsewhere is None else self.elsewhere.ended_with(ticket)
                endings.append(last_ending(ticket, raised, self.state, owners))
                ticket.settle(endings[-1])
        for future in self._asks.values():
            if not future.done():
                future.set_exception(self.crash.error())
        if self.elsewhere is not None:
            self.elsewhere.abandon()
        self.driver.say(endings)

    async def told(self) -> None:
        """Return when all clients have been told of their endings, `TOLD_S` from now at the latest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TOLD_S):
                while self.tickets:
                    await asyncio.sleep(0.01)

    # Requests.

    def submit(self, facts: RequestFacts, payload: Payload, client_id: str = "") -> Ticket:
        """Take a request in, under the id that its client knows it by.

        Raises Refused when the inbox is full, and for names that are not as they may be; every other ending comes
        through the ticket.
        """
        ticket = Ticket(next(self._numbers), payload, client_id, self.answers)
        return self._take(facts, ticket, self.admit if self.elsewhere is None else self.elsewhere.submit)

    def submit_here(self, facts: RequestFacts, ticket_of: Callable[[int], Ticket]) -> Ticket:
        """Take in a request that another replica has passed on, its ticket made by number; as `submit` otherwise."""
        return self._take(facts, ticket_of(next(self._numbers)), self.admit)

    def _take(self, facts: RequestFacts, ticket: Ticket, see_to: Callable[[Ticket, RequestFacts], None]) -> Ticket:
        if self.crash.raised is not None:
            raise self.crash.refused()
        facts.check()
        checked(identities.REQUEST_ID, ticket.client_id)
        self.tickets[ticket.request] = ticket
        try:
            see_to(ticket, facts)
        except Refused:
            del self.tickets[ticket.request]
            raise
        return ticket

    def admit(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Let this replica's core have a request. Raises Refused when the inbox is full."""
        deadline_ns = None if facts.deadline_s is None else monotonic_ns() + int(facts.deadline_s * 1e9)
        self.driver.post(facts.received(ticket.request, deadline_ns, ticket.client_id))

    def admit_again(self, ticket: Ticket, facts: RequestFacts) -> None:
        """As `admit`, for a request that was given back: the core knows it by another number from now on."""
        self._renumber(ticket)
        self.admit(ticket, facts)

    def withdraw(self, ticket: Ticket) -> None:
        """Take back from this replica's core a request that waits there."""
        number = ticket.request
        self._renumber(ticket)
        self.driver.tell(ev.ClientLeft(number, moved=True))

    def _renumber(self, ticket: Ticket) -> None:
        del self.tickets[ticket.request]
        ticket.request = next(self._numbers)
        self.tickets[ticket.request] = ticket

    def close(self, ticket: Ticket, moved: bool = False) -> None:
        """The front is done with a ticket; if the request had not ended, its client left, or another replica has it."""
        ticket.drop()
        if self.tickets.pop(ticket.request, None) is not None and ticket.settled is None:
            self._end(ticket, ev.ClientLeft(ticket.request, moved), Reason.CANCELLED)

    def cancel(self, ticket: Ticket) -> None:
        """End a request at its client's own word; the ending comes through the ticket."""
        self._end(ticket, ev.ClientLeft(ticket.request), Reason.CANCELLED)

    def _end(self, ticket: Ticket, event: ev.Event, reason: Reason) -> None:
        if self.elsewhere is None or not self.elsewhere.end(ticket, reason):
            self.driver.post(event)

    async def _sweep(self) -> None:
        """Cancel requests whose clients are too far behind for too long; drop sources that nobody needs any more."""
        while True:
            await asyncio.sleep(min(STALL_CHECK_S, self._client_stall_ns / 4e9))
            self.catalogue.forget_unneeded()
            self._cancel_stalled()

    def _cancel_stalled(self) -> None:  # apart from the loop, whose frame would keep the last ticket and its message
        now_ns = monotonic_ns()
        for ticket in list(self.tickets.values()):
            since_ns = ticket.behind_since_ns
            if since_ns is None or ticket.settled is not None:
                continue
            if now_ns - since_ns > self._client_stall_ns:
                self._end(ticket, ev.ClientStalled(ticket.request), Reason.CLIENT_STALLED)
            else:
                ticket.look()  # others may have left it room

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
            self.driver.post(ev.LoadFailed(effect.load, Fault.NOT_OWNED, LEASE_ENDED))
            return
        self.backends[effect.backend].load(effect, self.store.lease(effect.packed.key))

    def _has_lost(self, backend: str) -> bool:
        return self.elsewhere is not None and not self.elsewhere.may_dispatch(backend)

    def _dispatch(self, effect: do.Dispatch) -> None:
        if self._has_lost(effect.backend):
            text = f"{effect.backend}: {LEASE_ENDED}"
            self.driver.post(ev.RunFailed(effect.request, effect.attempt, Fault.NOT_OWNED, text))
            return
        ticket = self.tickets.get(effect.request)
        if ticket is None:  # the client left in this very moment; the core hears of it next
            self.driver.post(ev.RunEnded(effect.request, effect.attempt, 0))
            return
        ticket.dispatched(effect)
        weights = self.store.lease(effect.packed_key) if effect.attach else None
        self.backends[effect.backend].run(effect, ticket, weights)

    def _cancel_run(self, effect: do.CancelRun) -> None:
        self.backends[effect.backend].cancel(effect.request, effect.attempt)

    def _register_regions(self, effect: do.RegisterRegions) -> None:
        self.backends[effect.backend].register_regions()

    def _probe(self, effect: do.Probe) -> None:
        self.backends[effect.backend].probe(effect.within_ns / 1e9)

    def _settle(self, effect: do.Settle) -> None:
        ticket = self.tickets.get(effect.request)
        if ticket is None:
            return
        if effect.reason is not Reason.NOT_OWNER or self.elsewhere is None or not self.elsewhere.given_back(ticket):
            ticket.settle(admission.for_client(self.state, effect))

    def _answer(self, effect: do.Answer) -> None:
        future = self._asks.pop(effect.ask, None)
        if future is not None and not future.done():
            future.set_result(effect)

    def _note(self, effect: do.Effect) -> None:
        """Notes are for observers."""

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

    def set_drain(self, backend: str, draining: bool) -> None:
        self.known_backend(backend)
        self.driver.step(ev.DrainSet(backend, draining))

    def known_backend(self, backend: str) -> Any:
        """Return a backend's state in the core. Raises Misused with those that are configured."""
        found = self.state.backends.get(backend)
        if found is None:
            configured = ", ".join(self.state.backends) or "none"
            raise Misused(Reason.UNKNOWN_BACKEND, f'no backend is called "{backend[:80]}"; configured: {configured}')
        return found

    def on_packed(self, callback: Callable[[str, PackReport], None]) -> None:
        self.store.on_packed = callback


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
