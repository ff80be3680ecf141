"""Open requests in groups, and pages of them: rows of groups, backends, adapters and tenants, sorted and filtered.

Everything is read between steps and changes nothing. A row costs only when it is shown: what the rows are sorted by
comes from one walk over the open requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from policies.views import BASE
from sidecar.core.state import NEVER_NS, Request, State
from sidecar.telling.pool import state_of

Row = TypeVar("Row")
FINE = ("up", "joining")
SORTS = ("", "name", "waiting", "running", "oldest", "tokens")


@dataclass
class Group:
    """The open requests of one adapter and tenant at one backend, or of all with one of these names, counted.

    `backend` is "" where no backend can take them. `tokens` is what the waiting ones ask for, prompts included;
    `oldest` is the waiting one that arrived first, None if all run.
    """

    adapter: str = ""
    tenant: str = ""
    backend: str = ""
    waiting: int = 0
    running: int = 0
    tokens: int = 0
    oldest: Request | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        return self.adapter, self.tenant, self.backend

    @property
    def name(self) -> str:
        """The name of a group that has only one."""
        return self.adapter or self.tenant or self.backend

    def age(self) -> tuple[int, int, tuple[str, str, str]]:
        """Return what groups are sorted by, the longest wait first. Requests are numbered in order of arrival."""
        return NEVER_NS if self.oldest is None else self.oldest.id, -self.running, self.names

    def add(self, group: Group) -> None:
        self.waiting += group.waiting
        self.running += group.running
        self.tokens += group.tokens
        if group.oldest is not None and (self.oldest is None or group.oldest.id < self.oldest.id):
            self.oldest = group.oldest


def matching(
    state: State, adapter: str, backend: str, tenant: str | None, running: bool | None = None
) -> Iterator[Request]:
    """Yield requests in order of arrival, which is the order of their dict."""
    for request in state.requests.values():
        if running is not None and request.running is not running:
            continue
        if tenant is not None and request.view.tenant != tenant:
            continue
        if (not adapter or request.view.name == adapter) and (not backend or request.backend == backend):
            yield request


def groups_of(state: State, adapter: str = "", backend: str = "", tenant: str | None = None) -> list[Group]:
    groups: Groups = {}
    add_to_groups(groups, matching(state, adapter, backend, tenant))
    return list(groups.values())


Groups = dict[tuple[str, str, str], Group]
"""By the name of the adapter, the tenant, and the backend."""


def add_to_groups(groups: Groups, requests: Iterable[Request]) -> None:
    """Count requests, which come in order of arrival, but not those that have ended meanwhile."""
    for request in requests:
        if request.settled:
            continue
        view = request.view
        key = view.name, view.tenant, request.backend or ""
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(*key)
        if request.running:
            group.running += 1
            continue
        group.waiting += 1
        group.tokens += view.input_tokens + view.output_tokens_max
        if group.oldest is None:
            group.oldest = request


@dataclass(frozen=True)
class Page:
    """Which rows are shown. `sort` is one of SORTS; "" means the longest wait first."""

    sort: str = ""
    filter: str = ""
    offset: int = 0
    limit: int = 100

    def cut(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows[self.offset : self.offset + self.limit]

    def takes(self, *names: str) -> bool:
        """Return True if the filter's text is in one of a row's names, in whatever case."""
        return not self.filter or self.filter.lower() in "\n".join(names).lower()


def by_adapter(groups: Iterable[Group], state: State) -> list[Group]:
    """Return the open requests of every registered name, and those of the base model while it has some."""
    found: dict[str, Group] = {}
    for group in groups:
        found.setdefault(group.adapter, Group(adapter=group.adapter)).add(group)
    return [*found.values(), *(Group(adapter=name) for name in state.names if name not in found)]


def by_tenant(groups: Iterable[Group]) -> list[Group]:
    found: dict[str, Group] = {}
    for group in groups:
        found.setdefault(group.tenant, Group(tenant=group.tenant)).add(group)
    return list(found.values())


def by_backend(groups: Iterable[Group], state: State) -> list[Group]:
    """Return the open requests of every backend."""
    found = {backend: Group(backend=backend) for backend in state.backends}
    for group in groups:
        if group.backend in found:
            found[group.backend].add(group)
    return list(found.values())


def in_order(
    groups: Iterable[Group], page: Page, tokens: Mapping[str, float | None] | None = None, state: State | None = None
) -> list[Group]:
    """Return the groups that the page's filter takes, sorted; without an order those of backends that are not up first.

    `tokens` has the rates of groups with one name; without it the tokens that are asked for count. With `state` the
    groups are those of backends.
    """
    keys: dict[str, Callable[[Group], Any]] = {
        "name": lambda group: group.names,
        "waiting": lambda group: -group.waiting,
        "running": lambda group: -group.running,
        "tokens": lambda group: -(group.tokens if tokens is None else tokens.get(group.name) or 0.0),
    }
    key = keys.get(page.sort, Group.age)
    stands = {} if state is None else {name: state_of(state, backend) for name, backend in state.backends.items()}
    taken = [group for group in groups if page.takes(*_shown(group, tokens is None), stands.get(group.name, ""))]
    taken.sort(key=lambda group: (key(group), -group.running, group.names))
    if not page.sort and stands:
        taken.sort(key=lambda group: stands[group.name] in FINE)
    return taken


def _shown(group: Group, has_all_names: bool) -> tuple[str, ...]:
    return (group.adapter or "base model", group.tenant, group.backend) if has_all_names else (group.name,)


def copies_of(state: State, digests: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return where some versions are, as fields of an AdapterRow. The store is walked once for all of them."""
    stored: dict[str, str] = {}
    for tier, store in (("disk", state.disk), ("memory", state.store)):
        for entry in store.entries.values():
            stored[entry.digest] = tier if entry.ready else stored.get(entry.digest, "fetching")
    return {digest: _copies(state, digest, stored.get(digest, "")) for digest in digests if digest != BASE}


def _copies(state: State, digest: str, store: str) -> dict[str, Any]:
    tiers = [backend.shadow.tier(digest) for backend in state.backends.values()]
    loading = len(state.versions[digest].loads) if digest in state.versions else 0
    return {
        "on_gpu": tiers.count("gpu"),
        "in_engine_host": tiers.count("engine_host"),
        "loading": loading,
        "store": store,
    }
