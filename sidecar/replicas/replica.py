"""One of several replicas: assembles the keeper, the router, the planner and the service for other replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from time import monotonic, monotonic_ns
from typing import Any

import grpc
import grpc.aio

from policies.views import BASE, Routing
from sidecar.backends.api import Wear
from sidecar.backends.http_client import Sighting
from sidecar.core import eligibility, promising
from sidecar.core.effects import Effect
from sidecar.core.enums import Phase
from sidecar.core.events import BackendLeaving, BackendLost, BackendRemoved, BackendUp, Event
from sidecar.core.routing_view import candidate
from sidecar.core.state import Backend, State
from sidecar.errors import SidecarError
from sidecar.ownership.facts import LEADER, Bounds, Member
from sidecar.ownership.ownership import Ownership
from sidecar.proto import peers_pb2, peers_pb2_grpc
from sidecar.proto.filling import filled
from sidecar.replicas.answering import Answers
from sidecar.replicas.board import DOWN, DRAINING, JOINING, SERVING, STALLED, Board
from sidecar.replicas.carrying import sighting_of, sighting_sent
from sidecar.replicas.files import FilesHere, PeerFiles
from sidecar.replicas.keeper import Keeper, Leases
from sidecar.replicas.peers import Peers
from sidecar.replicas.planner import Arrivals, Newcomers, Planner
from sidecar.replicas.router import Router
from sidecar.shell.gateway import Gateway
from sidecar.tasks import Tasks

Boards = Callable[[], AsyncIterator[Any]]
Answer = Callable[[Any], Awaitable[Any]]


class PeersService(peers_pb2_grpc.PeersServicer):
    """Serves other replicas. `boards` yields this replica's boards, `answer` answers a question about a backend."""

    def __init__(self, gateway: Gateway, boards: Boards, answer: Answer) -> None:
        self._gateway = gateway
        self._boards = boards
        self._answer = answer
        self._files = FilesHere(gateway)
        self._answers: set[Answers] = set()
        self.told: Callable[[str, Sighting], None] = lambda exchange, sighting: None
        """Takes what another replica's proxy tells of an exchange of ours."""

    async def Forward(self, messages: AsyncIterator[Any], context: Any) -> None:  # noqa: N802
        """Answer requests until they end; cancelling the call cancels them."""
        answers = Answers(self._gateway, context)
        self._answers.add(answers)
        try:
            await answers.run(messages)
        finally:
            self._answers.discard(answers)

    def leave(self) -> None:
        """End the open calls once their pending replies are sent."""
        for answers in self._answers:
            answers.leave()

    async def Ask(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            return await self._answer(request)
        except SidecarError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)

    async def Tell(self, request: Any, context: Any) -> Any:  # noqa: N802
        for sent in request.sightings:
            try:
                self.told(sent.exchange, sighting_of(sent))
            except Exception:  # the others are of other requests
                logger.exception("what another replica's proxy tells of exchange %s cannot be read", sent.exchange)
        return peers_pb2.TellReply()

    async def Source(self, request: Any, context: Any) -> None:  # noqa: N802
        await self._files.send(request.digest, context)

    async def Keep(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            await self._files.keep(request.digest)
        except SidecarError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        return peers_pb2.KeepReply()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        async for board in self._boards():
            await context.write(board)


logger = logging.getLogger(__name__)

TELL_S = 1.0
LEAVE_S = 1.0
TELL_SIGHTINGS_S = 5.0
"""How long the other replicas may take to receive the last replies of this one."""


class Replica:
    """One of several replicas.

    The others reach this one at `address`. `backends` maps each backend to the replica that must own it, "" for any.
    `jitter` in [0, 1) spreads the replicas' periodic work over time. `routing` makes the policy that the leader plans
    with.
    """

    def __init__(
        self,
        gateway: Gateway,
        member: Member,
        address: str,
        backends: Mapping[str, str],
        leases: Leases,
        bounds: Bounds,
        jitter: float,
        open_channel: Callable[[str], grpc.aio.Channel],
        routing: Callable[[], Routing],
    ) -> None:
        self.member = member
        self.address = address
        self.board = Board()
        self.peers = Peers(member.id, self.board, open_channel)
        ownership = Ownership(member, {**backends, LEADER: ""}, bounds, jitter)
        self.keeper = Keeper(
            ownership,
            leases,
            self.peers,
            gateway.driver.tell,
            self._in_flight,
            self._changed,
            gateway.crash,
            gateway.state.config.raise_on,
        )
        self.router = Router(
            gateway,
            self.board,
            member.id,
            self.peers.forward_call,
            self.keeper.may_dispatch,
            lambda other: self.peers.stub(other) is not None,
        )
        self.peers.gone = self.router.gone
        gateway.elsewhere = self.router
        gateway.sources.others = PeerFiles(self.peers, gateway.sources.limits)
        self._gateway = gateway
        self._routing = routing
        self._planner: Planner | None = None
        self._plan: Any = None
        self._plans = 0
        self._arrivals = Arrivals(gateway.state)
        self._newcomers = Newcomers(gateway.state, self.board)
        self._spared = (0, 0)
        """The number of joining backends at the last report."""
        gateway.observe(self._arrivals)
        gateway.observe(self)
        self._restarts = ""
        """The engine that this replica is restarting, "" if none."""
        self._watchers: set[asyncio.Event] = set()
        self._leaves = False
        self._tasks = Tasks()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the service for other replicas to a gRPC server."""
        self._service = PeersService(self._gateway, self._reports, self.keeper.answer)
        self._server = server
        peers_pb2_grpc.add_PeersServicer_to_server(self._service, server)

    def start(self) -> None:
        """Join the members, and own the backends that fall to this replica."""
        self._tasks.spawn(self._report_periodically())
        self.keeper.start()

    def found(self, backend: str) -> None:
        """Add a discovered backend, and own it if it falls to this replica. The core must know it already."""
        self.keeper.found(backend)

    def gone(self, backend: str) -> None:
        """Remove a backend that the core has forgotten."""
        if self._planner is not None:
            self._planner.gone(backend)
        self.keeper.gone(backend)

    async def drain(self) -> None:
        """Give up each backend as its work ends, then leave the pool."""
        await self.keeper.drain()

    async def give_up(self) -> None:
        """Give up all backends at once, after a crash. Their requests must have been cancelled."""
        await self._tasks.stop()
        await self.keeper.give_up()

    async def leave(self) -> None:
        """Stop serving the other replicas once pending replies are sent."""
        self._leaves = True
        for changed in self._watchers:
            changed.set()
        self._service.leave()
        await self._server.stop(LEAVE_S)

    async def stop(self) -> None:
        await self._tasks.stop()
        await self.keeper.stop()
        await self.peers.close()

    def members(self) -> list[Member]:
        """Return the live members as last known, including this one, by name."""
        known = {self.member.id: self.member, **self.keeper.members}
        return sorted(known.values(), key=lambda member: (member.name, member.id))

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        """Report at once if an engine went, came, joined or stalled (`shell.driver.Observer`)."""
        state = self._gateway.state
        spared = len(state.joining), sum(backend.silence.suspected for backend in state.backends.values())
        if isinstance(event, BackendLost | BackendUp | BackendLeaving | BackendRemoved) or spared != self._spared:
            self._spared = spared
            asyncio.get_running_loop().call_soon(self._changed)

    def hear_sightings(self, told: Callable[[str, Sighting], None]) -> None:
        """Give what other replicas' proxies tell of exchanges of this replica to `told`."""
        self._service.told = told

    def tell_sightings(self, member: str, sightings: Sequence[tuple[str, Sighting]]) -> None:
        """Tell another replica what a proxy has told of its exchanges, also one that drains and has left the pool.

        Nothing is done for one that left long ago.
        """
        stub = self.peers.stub_of_any(member)
        if stub is None:
            return
        sent = [sighting_sent(sighting, exchange) for exchange, sighting in sightings]
        self._tasks.spawn(self._tell(stub, peers_pb2.TellRequest(sightings=sent)))

    async def _tell(self, stub: Any, request: Any) -> None:
        try:
            await stub.Tell(request, timeout=TELL_SIGHTINGS_S)
        except grpc.aio.AioRpcError as error:  # what is not told counts as lost, and the engine is asked
            logger.info("%s sightings of answers were not told: %s", len(request.sightings), error.details())

    def tell_restarting(self, backend: str) -> None:
        """Tell the other replicas which engine this one is restarting, "" for none."""
        if backend != self._restarts:
            self._restarts = backend
            self._changed()

    def restarted_elsewhere(self) -> set[str]:
        """Return the engines that other replicas say they are restarting."""
        return {backend for member, backend in self.board.restarting.items() if member != self.member.id}

    # Reports to the other replicas.

    async def _reports(self) -> AsyncIterator[Any]:
        """Yield this replica's whole board, now and whenever it changes."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self._leaves:
                yield self._own_board()
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    async def _report_periodically(self) -> None:
        while True:
            self._arrivals.next_second()
            try:
                self._make_plan()
            except Exception:  # a policy's bug: the other replicas still need the report
                logger.exception("no plan could be made; the last one stays")
            self._changed()
            for planned in self._newcomers.look():
                self._gateway.driver.post(planned)
            await asyncio.sleep(TELL_S)

    def _changed(self) -> None:
        self.board.heard(self._own_board(), monotonic())
        for changed in self._watchers:
            changed.set()
        self.router.look()

    def _own_board(self) -> Any:
        state, wear = self._gateway.state, self._gateway.fleet.wear()
        board = peers_pb2.Board(
            member=self.member.id,
            restarting=self._restarts,
            backends=[
                standing(state, backend, self._arrivals.of(backend.id), wear.get(backend.id))
                for backend in state.backends.values()
                if backend.owned
            ],
        )
        if self._plan is not None:
            board.plan.CopyFrom(self._plan)
        return board

    def _make_plan(self) -> None:
        """Make a new plan for all replicas if this replica leads."""
        epoch = self.keeper.leads_since
        if epoch is None:
            self._planner = self._plan = None
            return
        if self._planner is None:
            self._planner = Planner(self._gateway.state, self._routing())
        self._plans += 1
        hosts = self._planner.plan(self.board.to_plan_by(monotonic()), monotonic_ns())
        self._plan = peers_pb2.BoardPlan(
            epoch=epoch,
            number=self._plans,
            hosts={version: peers_pb2.BoardHosts(backends=found) for version, found in hosts.items()},
        )

    def _in_flight(self, backend: str) -> int:
        known = self._gateway.state.backends.get(backend)
        return 0 if known is None else known.in_flight


def standing(state: State, backend: Backend, arrived: Mapping[str, int], wear: Wear | None) -> Any:
    """Return the report about a backend that this replica owns."""
    seen = candidate(state, backend, BASE)
    known = backend.facts.device_pages is not None or backend.pages_learned is not None
    return filled(
        peers_pb2.BoardBackend,
        seen,
        backend=backend.id,
        epoch=backend.epoch,
        state=_state_of(state, backend),
        backlog_s=promising.serving_ns(state, backend) / 1e9,
        resident=list(backend.shadow.host.held),
        arrived=arrived,
        pages=eligibility.page_limit(backend) if known else None,
        versions_kept=0 if wear is None else wear.versions,
    )


def _state_of(state: State, backend: Backend) -> str:
    if backend.phase is not Phase.UP:
        return DRAINING if backend.leaving else DOWN
    if backend.draining or backend.leaving:
        return DRAINING
    if backend.silence.suspected:
        return STALLED
    return JOINING if backend.id in state.joining else SERVING
