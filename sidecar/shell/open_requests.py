"""The open requests of this process, for operators: list them, and cancel some of them.

These are the requests in its own core, those that other replicas have passed on to it included, and those that it has
passed on itself. A request that was passed on is listed by both replicas, and either can cancel it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from sidecar.core.state import Request
from sidecar.errors import Reason, Refused
from sidecar.model.reference import Reference
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import PassedOn
from sidecar.telling.verdict import Beyond


@dataclass(frozen=True)
class Chosen:
    """Which requests are meant: those that match everything that is not empty, and each name in `only`.

    An empty name in `only` means the base model, no tenant, no backend yet.
    """

    client_id: str = ""
    adapter: str = ""
    tenant: str = ""
    backend: str = ""
    only: Mapping[str, str] = field(default_factory=dict)
    """By "adapter", "tenant" and "backend"."""

    def takes(self, client_id: str, adapter: str, tenant: str, backend: str) -> bool:
        return (
            self.client_id in ("", client_id)
            and self.adapter in ("", adapter)
            and self.tenant in ("", tenant)
            and self.backend in ("", backend)
            and self.only.items() <= {"adapter": adapter, "tenant": tenant, "backend": backend}.items()
        )

    def takes_open(self, request: Request) -> bool:
        """Return True if it takes a request of this replica's core."""
        return self.takes(request.client_id, request.view.name, request.view.tenant, request.backend or "")


def names_in(only: Any) -> dict[str, str]:
    """Return the names of a RequestNames that are set, empty ones included."""
    return {field.name: value for field, value in only.ListFields()}


def open_requests(gateway: Gateway, chosen: Chosen) -> Iterator[Any]:
    """Yield the OpenRequest messages of the chosen requests, the oldest of this replica's own first.

    Read them between two steps of the core.
    """
    now_ns = monotonic_ns()
    for request in gateway.state.requests.values():
        if not request.settled and chosen.takes_open(request):
            yield shown(request, now_ns)
    yield from passed_on(gateway, chosen)


def passed_on(gateway: Gateway, chosen: Chosen) -> Iterator[Any]:
    """Yield the messages of the chosen ones of the requests that other replicas run for this one."""
    for each in _elsewhere(gateway, chosen):
        ticket, facts = each.ticket, each.facts
        name, version = Reference.of(facts.adapter)
        yield admin_pb2.OpenRequest(
            request=ticket.request,
            request_id=ticket.client_id,
            adapter=name,
            version=version,
            tenant=facts.tenant,
            backend=each.backend,
            state="passed on",
            age_s=each.age_s,
            input_tokens=facts.input_tokens,
            output_tokens_max=facts.output_tokens_max,
            **{"class": facts.klass},
        )


def _elsewhere(gateway: Gateway, chosen: Chosen) -> Iterator[PassedOn]:
    for each in gateway.elsewhere.passed_on() if gateway.elsewhere is not None else ():
        name = Reference.of(each.facts.adapter).name
        if chosen.takes(each.ticket.client_id, name, each.facts.tenant, each.backend):
            yield each


def beyond(gateway: Gateway, chosen: Chosen) -> Beyond:
    """Return what the verdict on the queue, or on the chosen part of it, says beyond what the core knows."""
    silent_s = {name: backend.signs().silent_s for name, backend in gateway.backends.items()}
    return Beyond(
        {name: None if each is None else int(each * 1e9) for name, each in silent_s.items()},
        Counter((each.owner, each.backend) for each in _elsewhere(gateway, chosen)),
        [name for name, successor in gateway.fleet.successors.items() if successor is not None],
        [what for what, fails in gateway.writers.items() if fails()],
        gateway.fleet.check.differing.values(),
    )


def shown(request: Request, now_ns: int) -> Any:
    """Return the OpenRequest message of one of this replica's core."""
    return filled(
        admin_pb2.OpenRequest,
        request.view,
        request=request.id,
        request_id=request.client_id,
        adapter=request.view.name,
        version=f"v{request.ordinal}" if request.view.name else "",
        backend=request.backend or "",
        state="running" if request.running else "waiting",
        age_s=(now_ns - request.view.arrived_ns) / 1e9,
        **{"class": request.view.klass},
    )


def check_chosen(chosen: Chosen) -> None:
    """Raise Refused(INVALID_REQUEST) if nothing is chosen: nobody cancels everything by leaving a word out."""
    if chosen == Chosen():
        raise Refused(Reason.INVALID_REQUEST, "say which requests: a request's id, an adapter, a tenant or a backend")


def cancel(gateway: Gateway, chosen: Chosen) -> int:
    """Cancel the chosen requests and return how many; their clients are told that an operator did."""
    numbers = [request.request for request in open_requests(gateway, chosen)]
    tickets = [gateway.tickets[number] for number in numbers if number in gateway.tickets]
    for ticket in tickets:
        gateway.cancel(ticket, by_operator=True)
    return len(tickets)
