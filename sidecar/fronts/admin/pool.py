"""The service `lorasidecar.v1.Pool`: one page of the pool, again and again, as `sidecar top` shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from time import monotonic_ns, thread_time, time
from typing import Any

from policies.views import BASE
from sidecar.access.principal import Action
from sidecar.config.identities import clipped
from sidecar.core.state import Backend, Request
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.admin.own_tenant import confined_to
from sidecar.fronts.status import abort
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.shell.flow import Rates, TokenRates
from sidecar.shell.gateway import Gateway
from sidecar.shell.open_requests import Chosen, beyond, names_in, passed_on, shown
from sidecar.state.records import paused_for
from sidecar.telling import groups as grouped
from sidecar.telling.endings import quarantined
from sidecar.telling.groups import Group, Page
from sidecar.telling.naming import called
from sidecar.telling.pool import backend_messages
from sidecar.telling.queue import group_message, oldest_message, verdict

ROWS_DEFAULT, ROWS_MAX = 100, 500
INTERVAL_S_DEFAULT, INTERVAL_S_MIN, INTERVAL_S_MAX = 1.0, 0.2, 60.0
LINGER_S = 5.0
SHARE_MAX = 0.02
"""What a viewer takes of a core at most: views of a large pool come less often."""
SLICE = 2000
"""Requests that are counted at once, in about two milliseconds."""


class PoolService(admin_pb2_grpc.PoolServicer):
    """Show a page of the pool to whoever watches. Tokens are counted while somebody does, and a little longer."""

    def __init__(self, gateway: Gateway, replica: str = "") -> None:
        self._gateway = gateway
        self._replica = replica
        self._rates: TokenRates | None = None
        self._watching = 0

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        try:
            make = self._maker(request, context)
            interval_s = _interval_s(request.interval_s)
            rates = self._counted()
            try:
                while True:
                    begun_s = thread_time()
                    view = await make(rates)
                    await context.write(view)
                    # On one core with all else: what a slice of another's work takes counts too, which errs towards
                    # fewer views while the process is busy.
                    await self._pause(max(interval_s, (thread_time() - begun_s) / SHARE_MAX))
            finally:
                self._leave()
        except SidecarError as error:
            await abort(context, error)

    async def _pause(self, left_s: float) -> None:
        """Wait for the next view. Raises Misused(UNAUTHENTICATED) when the caller's credential ends meanwhile."""
        while left_s > 0:
            await asyncio.sleep(min(left_s, callers.CHECKED_S))
            left_s -= callers.CHECKED_S
            self._gateway.access.check(callers.CALLER.get())

    def _counted(self) -> TokenRates:
        """Return what counts tokens; the first viewer installs it, the last one that leaves removes it."""
        if self._rates is None:
            self._rates = TokenRates(self._gateway.state, self._gateway.tickets, self._gateway.backends)
            self._gateway.observe(self._rates)
        self._watching += 1
        return self._rates

    def _leave(self) -> None:
        """Count one viewer less. One that turns a page leaves and comes again: what was counted is kept a while."""
        self._watching -= 1
        asyncio.get_running_loop().call_later(LINGER_S, self._forget_unwatched)

    def _forget_unwatched(self) -> None:
        if not self._watching and self._rates is not None:
            self._gateway.driver.forget(self._rates)
            self._rates = None

    def _maker(self, request: Any, context: Any) -> Callable[[TokenRates], Awaitable[Any]]:
        """Return what makes the views that a request asks for. Raises Refused if it asks for what is not there."""
        page = request.page or "queue"
        if page not in NAMES:
            raise Refused(Reason.INVALID_REQUEST, f'page is "{clipped(page)}"; it is one of {", ".join(NAMES)}')
        if request.sort not in grouped.SORTS:
            sorts = ", ".join(filter(None, grouped.SORTS))
            raise Refused(Reason.INVALID_REQUEST, f'sort is "{clipped(request.sort)}"; it is one of {sorts}, or empty')
        tenant = confined_to(self._gateway.access, Action.SEE_QUEUE, "", context)
        if request.lanes_of and tenant is None:
            self._gateway.known_backend(request.lanes_of)
        cut = Page(request.sort, request.filter, request.offset, min(request.limit or ROWS_DEFAULT, ROWS_MAX))
        only = Chosen(only=names_in(request.only))
        lanes_of = request.lanes_of if tenant is None else ""
        return lambda rates: self._view(page, cut, only, lanes_of, tenant, rates)

    async def _walked(self, listed: Page | None, only: Chosen, tenant: str | None) -> tuple[list[Group], list[Request]]:
        """Return the groups of all open requests and, if they are listed, those that `only` and the page's filter take.

        They are walked a slice at a time: the loop serves requests in between.
        """
        groups: grouped.Groups = {}
        taken: list[Request] = []
        requests = list(self._gateway.state.requests.values())
        for start in range(0, len(requests), SLICE):
            part = requests[start : start + SLICE]
            if tenant is not None:
                part = [each for each in part if each.view.tenant == tenant]
            grouped.add_to_groups(groups, part)
            if listed is not None:
                if only.only:
                    part = [each for each in part if only.takes_open(each)]
                taken += part if not listed.filter else [each for each in part if listed.takes(*_names_of(each))]
            await asyncio.sleep(0)
        for group in groups.values():
            if group.oldest is not None and (group.oldest.running or group.oldest.settled):
                group.oldest = None  # it was sent, or ended, in between
        return list(groups.values()), [each for each in taken if not each.settled]

    async def _view(
        self, page: str, cut: Page, only: Chosen, lanes_of: str, tenant: str | None, counted: TokenRates
    ) -> Any:
        groups, taken = await self._walked(cut if page == "requests" else None, only, tenant)
        state, now_ns = self._gateway.state, monotonic_ns()
        rates = counted.rates(now_ns)
        message = admin_pb2.PoolView(
            time=time(),
            replica=self._replica,
            verdict=verdict(state, now_ns, groups, tenant, beyond(self._gateway, Chosen(tenant=tenant or ""))),
            waiting=sum(group.waiting for group in groups),
            running=sum(group.running for group in groups),
        )
        if tenant is None:
            backends = state.backends.values()
            message.backends = len(backends)
            message.backends_serving = sum(backend.takes_requests for backend in backends)
            message.seats = sum(backend.seats(state.config) for backend in backends)
            message.seats_assumed = any(backend.facts.seats is None for backend in backends)
            message.adapters = len(state.names)
            if rates is not None and rates.total is not None:
                message.tokens_per_s = rates.total
        if tenant is None or page in OWN_PAGES:
            if page == "requests":
                self._requests(message, taken, cut, replace(only, tenant=tenant or ""), now_ns)
            else:
                PAGES[page](self, message, groups, cut, rates, now_ns)
        if lanes_of in state.backends:
            message.lanes.extend(self._lanes(state.backends[lanes_of], self._gateway.lanes.of(lanes_of)))
        return message

    # Pages.

    def _queue(self, message: Any, groups: list[Group], page: Page, rates: Rates | None, now_ns: int) -> None:
        taken = grouped.in_order(groups, page)
        message.rows_total = len(taken)
        for group in page.cut(taken):
            message.groups.append(group_message(self._gateway.state, group, now_ns))

    def _backends(self, message: Any, groups: list[Group], page: Page, rates: Rates | None, now_ns: int) -> None:
        state = self._gateway.state
        by_name = {} if rates is None else rates.backends
        taken = grouped.in_order(grouped.by_backend(groups, state), page, by_name, state)
        message.rows_total = len(taken)
        for row in backend_messages(state, now_ns, [group.backend for group in page.cut(taken)]):
            made = message.backend_rows.add()
            made.backend.CopyFrom(row)
            for field in NOT_IN_ROWS:
                made.backend.ClearField(field)
            silent_s = self._gateway.backends[row.id].signs().silent_s
            if silent_s is not None:
                made.silent_s = silent_s
            _set_rate(made, row.id, rates, by_name)

    def _adapters(self, message: Any, groups: list[Group], page: Page, rates: Rates | None, now_ns: int) -> None:
        state = self._gateway.state
        by_name = {} if rates is None else rates.adapters
        rows = self._cut(message, grouped.by_adapter(groups, state), page, by_name)
        digests = {row.name: state.names[row.name].digest for row in rows if row.name in state.names}
        copies = grouped.copies_of(state, digests.values())
        for row in rows:
            made = message.adapter_rows.add(name=row.name, waiting=row.waiting, running=row.running)
            self._set_oldest(made, row, now_ns)
            _set_rate(made, row.name, rates, by_name)
            digest = digests.get(row.name, BASE)
            if digest in copies:
                name = state.names[row.name]
                made.MergeFrom(admin_pb2.AdapterRow(pinned=name.pinned, version=f"v{name.current}", **copies[digest]))
                made.quarantined = quarantined(state.versions[digest].quarantined)
            record = self._gateway.catalogue.registry.get(row.name)
            if record is not None:
                made.paused_s = paused_for(record, time()) or 0.0

    def _tenants(self, message: Any, groups: list[Group], page: Page, rates: Rates | None, now_ns: int) -> None:
        by_name = {} if rates is None else rates.tenants
        for row in self._cut(message, grouped.by_tenant(groups), page, by_name):
            weight = self._gateway.state.config.tenant_weights.get(row.name, 1.0)
            made = message.tenant_rows.add(
                tenant=row.name, waiting=row.waiting, running=row.running, tokens=row.tokens, weight=weight
            )
            self._set_oldest(made, row, now_ns)
            _set_rate(made, row.name, rates, by_name)

    def _requests(self, message: Any, own: list[Request], page: Page, only: Chosen, now_ns: int) -> None:
        """Add open requests, the oldest first whatever is asked for: to sort ten thousand takes too long."""
        elsewhere = [
            each
            for each in passed_on(self._gateway, only)
            if page.takes(each.client_id, each.adapter, each.tenant, each.state)
        ]
        message.rows_total = len(own) + len(elsewhere)
        for request in page.cut(own):
            message.request_rows.append(shown(request, now_ns))
        left_out = max(0, page.offset - len(own))
        for each in elsewhere[left_out : left_out + page.limit - len(message.request_rows)]:
            message.request_rows.append(each)

    @staticmethod
    def _cut(message: Any, rows: Sequence[Group], page: Page, rates: Mapping[str, float | None]) -> Sequence[Group]:
        taken = grouped.in_order(rows, page, rates)
        message.rows_total = len(taken)
        return page.cut(taken)

    def _set_oldest(self, message: Any, row: Group, now_ns: int) -> None:
        if row.oldest is not None:
            message.oldest.CopyFrom(oldest_message(self._gateway.state, row.oldest, now_ns))

    def _lanes(self, backend: Backend, lanes: Sequence[Sequence[str]]) -> Iterator[Any]:
        """Yield lanes with names in place of versions."""
        versions = {version for lane in lanes for version in lane if version}
        labels = {version: called(self._gateway.state, version, backend) for version in versions}
        for lane in lanes:
            numbers: dict[str, int] = {}
            held = [numbers.setdefault(version, len(numbers) + 1) if version else 0 for version in lane]
            yield admin_pb2.Lane(held=held, names=map(labels.__getitem__, numbers))


def _names_of(request: Request) -> tuple[str, ...]:
    state = "running" if request.running else "waiting"
    return request.client_id, request.view.name, request.view.tenant, request.backend or "", state


def _set_rate(message: Any, name: str, rates: Rates | None, by_name: Mapping[str, float | None]) -> None:
    rate = None if rates is None else by_name.get(name, 0.0)
    if rate is not None:
        message.tokens_per_s = rate


def _interval_s(asked: float) -> float:
    if not isfinite(asked) or asked < 0:
        raise Refused(Reason.INVALID_REQUEST, f"interval_s is {asked:g}; it must be 0 or more seconds")
    return min(max(asked or INTERVAL_S_DEFAULT, INTERVAL_S_MIN), INTERVAL_S_MAX)


PAGES: dict[str, Callable[..., None]] = {
    "queue": PoolService._queue,
    "backends": PoolService._backends,
    "adapters": PoolService._adapters,
    "tenants": PoolService._tenants,
}
NAMES = (*PAGES, "requests")
OWN_PAGES = ("queue", "tenants", "requests")
"""The pages that somebody who is confined to a tenant sees."""
NOT_IN_ROWS = ("resident", "heals")
"""What only `sidecar backends show` tells: there may be thousands."""
