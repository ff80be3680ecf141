"""Virtual token counters: how much each tenant has been served, and who may be served next.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: 1 for an input token and 2 for an output token,
over the tenant's weight; the counter of a tenant that begins to wait is lifted to the least of those that wait, so that
idling earns nothing. Output is charged in advance, as much as the client allows, and corrected at the end.

Here a tenant may wait without being short of its share: for a slot for its adapter. So what it is owed is never more
than what it has waiting, and the rest is written off: a tenant that asks for little holds nobody back, now or later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.views import Waiting

INPUT_COST, OUTPUT_COST = 1, 2
MEAN_SHARE = 0.01
TENANTS_KEPT = 1000
"""Counters of tenants with nothing outstanding are forgotten beyond so many."""


@dataclass(slots=True)
class Waits:
    """What a tenant has waiting."""

    requests: int = 0
    cost: float = 0.0

    def add(self, cost: float) -> None:
        self.requests += 1
        self.cost += cost

    def remove(self, cost: float) -> None:
        self.requests -= 1
        self.cost -= cost


class TokenCounters:
    """The counters of one backend. `slack_requests` is how far ahead a tenant may be, in requests of the usual cost."""

    def __init__(self, slack_requests: int) -> None:
        self._slack_requests = slack_requests
        self._served: dict[str, float] = {}
        self._waiting: dict[str, Waits] = {}
        self._usual_cost = 0.0

    def queued(self, request: Waiting) -> None:
        tenant = request.tenant
        if tenant not in self._waiting:
            least = self.least()
            self._served[tenant] = max(self._served.get(tenant, 0.0), least or 0.0)
            self._forget_idle()
        cost = _cost(request)
        self._waiting.setdefault(tenant, Waits()).add(cost)
        self._usual_cost += (MEAN_SHARE if self._usual_cost else 1.0) * (cost - self._usual_cost)

    def left(self, request: Waiting) -> None:
        waits = self._waiting[request.tenant]
        waits.remove(_cost(request))
        if not waits.requests:
            del self._waiting[request.tenant]

    def sent(self, request: Waiting) -> None:
        """Charge a request that is dispatched."""
        self._served[request.tenant] = self._served.get(request.tenant, 0.0) + _cost(request)

    def ended(self, request: Waiting, output_tokens: int) -> None:
        """Give back what was charged for output that did not come."""
        if request.tenant in self._served:
            unused = OUTPUT_COST * (request.output_tokens_max - output_tokens)
            self._served[request.tenant] -= unused / request.weight

    def least(self) -> float | None:
        """Return the least counter of those that wait, as it is once what nobody is owed has been written off."""
        if not self._waiting:
            return None
        most = max(self._served[tenant] for tenant in self._waiting)
        return min(max(self._served[tenant], most - waits.cost) for tenant, waits in self._waiting.items())

    def write_off(self) -> None:
        """Lift the counters of those that wait for less than they are behind."""
        if len(self._waiting) > 1:
            most = max(self._served[tenant] for tenant in self._waiting)
            for tenant, waits in self._waiting.items():
                self._served[tenant] = max(self._served[tenant], most - waits.cost)

    def served_most(self) -> float | None:
        """Return the counter up to which tenants may be served; None while only one waits and all may."""
        if len(self._waiting) < 2:
            return None
        least = self.least()
        assert least is not None
        return least + self._slack_requests * self._usual_cost

    def served(self, tenant: str) -> float:
        """Return the counter of a tenant that waits."""
        return self._served[tenant]

    def may_go(self, tenant: str, served_most: float | None) -> bool:
        return served_most is None or self._served[tenant] <= served_most

    def some_are_ahead(self, served_most: float | None) -> bool:
        """Whether a waiting tenant is held back."""
        return served_most is not None and any(self._served[tenant] > served_most for tenant in self._waiting)

    def snapshot(self) -> Any:
        waiting = [[tenant, waits.requests, waits.cost] for tenant, waits in self._waiting.items()]
        return [self._usual_cost, list(self._served.items()), waiting]

    def restore(self, state: Any) -> None:
        """Take it all as it was: sums of costs made anew could differ in their last digit."""
        self._usual_cost, served, waiting = state
        self._served = dict(served)
        self._waiting = {tenant: Waits(requests, cost) for tenant, requests, cost in waiting}

    def _forget_idle(self) -> None:
        if len(self._served) > TENANTS_KEPT + 2 * len(self._waiting):
            least = self.least() or 0.0
            self._served = {t: s for t, s in self._served.items() if t in self._waiting or s > least}


def _cost(request: Waiting) -> float:
    return (INPUT_COST * request.input_tokens + OUTPUT_COST * request.output_tokens_max) / request.weight
