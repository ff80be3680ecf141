"""Virtual token counters: how much service each tenant has received, and which may be served next.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: 1 for an input token and 2 for an output token,
over the tenant's weight. The counter of a tenant that begins to wait is lifted to the least of those that wait, so
that idling earns nothing. Output is charged in advance, up to the client's limit, and corrected at the end.

Here a tenant may wait although it has its share: for a slot for its adapter. So it is owed at most what it has
waiting: others are held back for no more than that, and the rest is written off when the tenant is next sent or asks
for more. A tenant that asks for little holds no other back, now or later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.ordering.owed import Owed
from policies.views import Waiting

INPUT_COST, OUTPUT_COST = 1, 2
MEAN_SHARE = 0.01
TENANTS_KEPT = 1000
"""How many counters of tenants without waiting requests are kept; past that the less served half is forgotten."""


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
    """The counters of one backend. How far ahead a tenant may be is given in requests of average cost."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        """The counters of all tenants that wait, and of some that do not."""
        self._waiting: dict[str, Waits] = {}
        self._usual_cost = 0.0
        self._owed = Owed()
        self._changed: dict[str, None] = {}
        """Tenants with changes that `_owed` has not seen: only the last of several changes counts."""

    def queued(self, request: Waiting) -> None:
        tenant, cost = request.tenant, cost_of(request)
        if tenant in self._waiting:
            self._write_off(tenant)
        else:
            least = self._tell_owed().least if self._waiting else 0.0
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
            self._waiting[tenant] = Waits()
        self._waiting[tenant].add(cost)
        self._changed[tenant] = None
        self._usual_cost += (MEAN_SHARE if self._usual_cost else 1.0) * (cost - self._usual_cost)

    def left(self, request: Waiting) -> None:
        waits = self._waiting[request.tenant]
        waits.remove(cost_of(request))
        if not waits.requests:
            del self._waiting[request.tenant]
            self._forget_idle()
        self._changed[request.tenant] = None

    def sent(self, request: Waiting) -> None:
        """Charge a request that is dispatched; it still counts as waiting."""
        self._write_off(request.tenant)
        self._served[request.tenant] += cost_of(request)
        self._changed[request.tenant] = None

    def ended(self, request: Waiting, output_tokens: int) -> None:
        """Refund the charge for output that did not come."""
        tenant = request.tenant
        if tenant in self._served:
            unused = OUTPUT_COST * (request.output_tokens_max - output_tokens)
            self._served[tenant] -= unused / request.weight
            if tenant in self._waiting:
                self._changed[tenant] = None

    @property
    def usual_tokens(self) -> float:
        """The average cost of a request, in output tokens."""
        return self._usual_cost / OUTPUT_COST

    @property
    def several(self) -> bool:
        """True if more than one tenant waits."""
        return len(self._waiting) > 1

    def served(self, tenant: str) -> float:
        """Return the counter of a waiting tenant."""
        return self._served[tenant]

    def some_are_behind(self, tenant: str) -> bool:
        """Return True if a waiting tenant has been served less than this one."""
        return self.several and self._tell_owed().served_least < self._served[tenant]

    def served_most(self, slack_requests: int) -> float | None:
        """Return the counter up to which tenants may be served; None if all may."""
        if not self.several:
            return None
        return self._tell_owed().least + slack_requests * self._usual_cost

    def may_go(self, tenant: str, served_most: float | None) -> bool:
        return served_most is None or self._served[tenant] <= served_most

    def some_are_ahead(self, served_most: float | None) -> bool:
        """Return True if a waiting tenant is held back."""
        return served_most is not None and self._tell_owed().most > served_most

    def snapshot(self) -> Any:
        waiting = [[tenant, waits.requests, waits.cost] for tenant, waits in self._waiting.items()]
        return [self._usual_cost, list(self._served.items()), waiting]

    def restore(self, state: Any) -> None:
        """Restore all sums as they were: recomputed sums of costs could differ in their last digit."""
        self._usual_cost, served, waiting = state
        self._served = dict(served)
        self._waiting = {tenant: Waits(requests, cost) for tenant, requests, cost in waiting}
        self._owed, self._changed = Owed(), dict.fromkeys(self._waiting)

    def _write_off(self, tenant: str) -> None:
        """Lift the counter of a tenant that is owed more than it has waiting."""
        if self.several:
            most = self._tell_owed().most
            self._served[tenant] = max(self._served[tenant], most - self._waiting[tenant].cost)

    def _tell_owed(self) -> Owed:
        for tenant in self._changed:
            waits = self._waiting.get(tenant)
            if waits is None:
                self._owed.discard(tenant)
            else:
                self._owed.put(tenant, self._served[tenant], waits.cost)
        self._changed.clear()
        return self._owed

    def _forget_idle(self) -> None:
        """Forget the less served half of too many idle tenants: lifting them when they return changes least."""
        if len(self._served) - len(self._waiting) <= TENANTS_KEPT:
            return
        idle = sorted((served, tenant) for tenant, served in self._served.items() if tenant not in self._waiting)
        for _, tenant in idle[: len(idle) - TENANTS_KEPT // 2]:
            del self._served[tenant]


def cost_of(request: Waiting) -> float:
    """Return what a request is charged when it is sent."""
    return (INPUT_COST * request.input_tokens + OUTPUT_COST * request.output_tokens_max) / request.weight
