"""Carry out the effects of `sidecar.ownership`: beats and leases in Redis, questions to members, events to the core.

Steps run one at a time on the event loop. An effect that must wait runs as a task, whose result is the next event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from time import monotonic_ns
from typing import Any, Protocol

from sidecar.core import events as core_events
from sidecar.core import injected
from sidecar.errors import Refused
from sidecar.journal.raised import Raised
from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.facts import LEADER, Member
from sidecar.ownership.ownership import Ownership
from sidecar.proto import peers_pb2
from sidecar.replicas.peers import Peers
from sidecar.shell.crash import Crash
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

IN_FLIGHT_LOOK_S = 0.05
GIVE_UP_S = 1.0
WITH_WORK = (Why.MOVED, Why.DRAINING)
"""Why a backend is given up that is held until what runs there has ended."""


class Leases(Protocol):
    """Members and leases where all replicas see them. Every method raises Refused(STATE_UNAVAILABLE) while it is away.

    `beat` returns what is known, and the address of each live member.
    """

    async def beat(self, effect: do.SendBeat) -> tuple[ev.BeatAnswered, dict[str, str]]: ...

    async def leave(self, effect: do.SendLeave) -> None: ...

    async def acquire(self, effect: do.SendAcquire) -> ev.LeaseAnswered: ...

    async def renew(self, effect: do.SendRenew) -> ev.LeaseAnswered: ...

    async def release(self, effect: do.SendRelease) -> None: ...


class Keeper:
    """Carries out the effects of `Ownership` for one replica.

    `tell` passes an event to the core, `in_flight` returns the requests at a backend's engine, `changed` is called when
    the other replicas need a new report. An exception in a step of ownership is a `crash`.
    """

    def __init__(
        self,
        ownership: Ownership,
        leases: Leases,
        peers: Peers,
        tell: Callable[[core_events.Event], None],
        in_flight: Callable[[str], int],
        changed: Callable[[], None],
        crash: Crash,
        raise_on: str = "",
    ) -> None:
        self._crash = crash
        self._raise_on = raise_on
        self.leads_since: int | None = None
        """The epoch under which this replica leads, or None while another one leads."""
        self.changes = {"taken": 0, "given_up": 0}
        self._ownership = ownership
        self._leases = leases
        self._peers = peers
        self._tell = tell
        self._in_flight = in_flight
        self._changed = changed
        self._tasks = Tasks()
        self._timer: asyncio.TimerHandle | None = None
        self._asked: dict[int, asyncio.Future[do.Answer]] = {}
        self._numbers = itertools.count(1)
        self._left = asyncio.Event()
        self._stopped = False

    def start(self) -> None:
        self._step(ev.Tick())

    @property
    def members(self) -> Mapping[str, Member]:
        """The live members as of the last answer of Redis."""
        return self._ownership.know.members

    def may_dispatch(self, backend: str) -> bool:
        """Return True if a request may be sent to a backend now."""
        return self._ownership.may_dispatch(backend, monotonic_ns()) is not None

    async def answer(self, request: Any) -> Any:
        """Answer another member's question about a backend. Raises Failed after a crash."""
        number = next(self._numbers)
        future: asyncio.Future[do.Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._step(ev.AskReceived(number, request.member, request.backend, Purpose[request.purpose], request.epoch))
            if self._crash.raised is not None:
                raise self._crash.error()
            answer = await future
        finally:
            del self._asked[number]
        return peers_pb2.AskReply(
            agreed=answer.agreed, holds=answer.holds, reaches_redis=answer.reaches_redis, epoch=answer.epoch
        )

    def found(self, backend: str) -> None:
        """Add a backend, which the core must know already."""
        self._step(ev.BackendFound(backend))

    def gone(self, backend: str) -> None:
        """Remove a backend, which the core must have forgotten."""
        self._step(ev.BackendGone(backend))

    async def drain(self) -> None:
        """Give up each backend as its work ends, then leave the pool. Returns once left."""
        self._step(ev.DrainBegun())
        await self._left.wait()

    async def stop(self) -> None:
        """End what asks Redis or other members. Nothing asks them afterwards: the caller closes the connections."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.stop()

    async def give_up(self) -> None:
        """Release all leases at once, within `GIVE_UP_S`, without a step of ownership, which may have crashed.

        Call it when nothing runs at the engines any more. Leases that Redis does not hear of expire.
        """
        await self.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(GIVE_UP_S):
                await self._unanswered(lambda: self._leases.leave(do.SendLeave(self._ownership.know.member.id)))

    # Steps.

    def _step(self, event: ev.Event) -> None:
        if self._stopped or self._crash.raised is not None:  # an answer can come in spite of a cancellation: `ended`
            return
        now_ns = monotonic_ns()
        try:
            effects = self._ownership.step(event, now_ns)
            injected.check(self._raise_on, event)
            for effect in effects:
                _EFFECTS[type(effect)](self, effect)
        except BaseException as error:
            self._crash.happen(Raised(error, now_ns, ownership=type(event).__name__))
            if not isinstance(error, Exception):
                raise

    def _wake_at(self, effect: do.WakeAt) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0, effect.at_ns - monotonic_ns()) / 1e9 + 0.0005  # a timer may fire early
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._step, ev.Tick())

    # Redis.

    def _send_beat(self, effect: do.SendBeat) -> None:
        self._tasks.spawn(self._beat(effect))

    async def _beat(self, effect: do.SendBeat) -> None:
        try:
            answered, addresses = await self._leases.beat(effect)
        except Exception as error:  # noqa: BLE001 — any error means no answer
            _log_no_answer("beat", error)
            self._step(ev.BeatFailed(effect.number))
            return
        addresses.pop(effect.member.id, None)
        self._peers.are(addresses)
        self._step(answered)

    def _send_acquire(self, effect: do.SendAcquire) -> None:
        self._tasks.spawn(self._lease(effect.number, lambda: self._leases.acquire(effect)))

    def _send_renew(self, effect: do.SendRenew) -> None:
        self._tasks.spawn(self._lease(effect.number, lambda: self._leases.renew(effect)))

    async def _lease(self, number: int, call: Callable[[], Coroutine[Any, Any, ev.LeaseAnswered]]) -> None:
        try:
            answered = await call()
        except Exception as error:  # noqa: BLE001 — any error means no answer
            _log_no_answer("lease", error)
            self._step(ev.LeaseFailed(number))
        else:
            self._step(answered)

    def _send_release(self, effect: do.SendRelease) -> None:
        self._tasks.spawn(self._unanswered(lambda: self._leases.release(effect)))

    def _send_leave(self, effect: do.SendLeave) -> None:
        self._tasks.spawn(self._leave(effect))

    async def _leave(self, effect: do.SendLeave) -> None:
        await self._unanswered(lambda: self._leases.leave(effect))
        self._left.set()

    async def _unanswered(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await call()
        except Refused as refused:
            logger.info("not told to Redis, where it will expire: %s", refused.message)

    # Other members.

    def _send_ask(self, effect: do.SendAsk) -> None:
        self._tasks.spawn(self._ask(effect))

    async def _ask(self, effect: do.SendAsk) -> None:
        request = peers_pb2.AskRequest(
            member=self._ownership.know.member.id,
            backend=effect.backend,
            purpose=effect.purpose.name,
            epoch=effect.epoch,
        )
        reply = await self._peers.ask(effect.to, request)
        if reply is not None:
            self._step(
                ev.AskAnswered(effect.number, effect.to, reply.agreed, reply.holds, reply.reaches_redis, reply.epoch)
            )

    def _answer(self, effect: do.Answer) -> None:
        future = self._asked.get(effect.number)
        if future is not None and not future.done():
            future.set_result(effect)

    # The core.

    def _own(self, effect: do.Own) -> None:
        if effect.backend == LEADER:
            self.leads_since = effect.epoch
            return
        logger.info("%s is ours under epoch %d", effect.backend, effect.epoch)
        self.changes["taken"] += 1
        self._tell(core_events.BackendTaken(effect.backend, effect.epoch))
        self._changed()

    def _disown(self, effect: do.Disown) -> None:
        if effect.backend == LEADER:
            self.leads_since = None
            if effect.why in WITH_WORK:
                self._tasks.spawn(self._until_idle(LEADER))
            return
        logger.info("%s is given up: %s", effect.backend, effect.why.value)
        self.changes["given_up"] += 1
        self._tell(core_events.BackendGivenUp(effect.backend, effect.why.value))
        self._changed()
        if effect.why in WITH_WORK:
            self._tasks.spawn(self._until_idle(effect.backend))

    async def _until_idle(self, backend: str) -> None:
        while backend != LEADER and self._in_flight(backend):
            await asyncio.sleep(IN_FLIGHT_LOOK_S)
        self._step(ev.InFlightEnded(backend))


def _log_no_answer(what: str, error: Exception) -> None:
    """Log why Redis gave no answer. A bug of ours counts as no answer too, or this member would wait for ever."""
    if isinstance(error, Refused):
        logger.info("no %s: %s", what, error.message)
    else:
        logger.error("no %s", what, exc_info=error)


_EFFECTS: dict[type, Callable[[Keeper, Any], None]] = {
    do.SendBeat: Keeper._send_beat,
    do.SendLeave: Keeper._send_leave,
    do.SendAcquire: Keeper._send_acquire,
    do.SendRenew: Keeper._send_renew,
    do.SendRelease: Keeper._send_release,
    do.SendAsk: Keeper._send_ask,
    do.Answer: Keeper._answer,
    do.Own: Keeper._own,
    do.Disown: Keeper._disown,
    do.WakeAt: Keeper._wake_at,
}
