"""Open requests in groups, and pages of them: rows of groups, backends, adapters and tenants, sorted and filtered.

Everything is read between steps and changes nothing. A row costs only when it is shown: what the rows are sorted by
comes from one walk over the open requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from policies.views import BASE
from sidecar.core.state import NEVER_NS, Request, State
from sidecar.telling.pool import state_of

Row = TypeVar("Row")
FINE = ("", "up", "joining")
SORTS = ("", "name", "waiting", "running", "oldest", "tokens")


@dataclass
class Group:
    """The requests of one adapter and tenant at one backend, counted; `backend` is "" where no backend can take them.

    `tokens` is what the waiting ones ask for, prompts included. `oldest` is the waiting one that arrived first, None if
    all run.
    """

    adapter: str
    tenant: str
    backend: str
    waiting: int = 0
    running: int = 0
    tokens: int = 0
    oldest: Request | None = None

    def place(self) -> tuple[int, int, str, str, str]:
        """Return what groups are sorted by. Requests are numbered in order of arrival."""
        first = NEVER_NS if self.oldest is None else self.oldest.id
        return first, -self.running, self.adapter, self.tenant, self.backend


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


@dataclass
class Activity:
    """The open requests of one adapter, tenant or backend."""

    name: str
    waiting: int = 0
    running: int = 0
    tokens: int = 0
    oldest: Request | None = None
    state: str = ""
    """Of a backend."""

    def add(self, group: Group) -> None:
        self.waiting += group.waiting
        self.running += group.running
        self.tokens += group.tokens
        if group.oldest is not None and (self.oldest is None or group.oldest.id < self.oldest.id):
            self.oldest = group.oldest


def activities(groups: Iterable[Group], name_of: Callable[[Group], str]) -> dict[str, Activity]:
    """Return the open requests by adapter, tenant or backend."""
    found: dict[str, Activity] = {}
    for group in groups:
        name = name_of(group)
        found.setdefault(name, Activity(name)).add(group)
    return found


def in_order(rows: Iterable[Activity], page: Page, rates: Mapping[str, float | None]) -> list[Activity]:
    """Return the rows that the page's filter takes, sorted; backends that are not up precede, unless one asks else."""
    keys: dict[str, Callable[[Activity], float | str]] = {
        "": _by_age,
        "name": lambda row: row.name,
        "waiting": lambda row: -row.waiting,
        "running": lambda row: -row.running,
        "oldest": _by_age,
        "tokens": lambda row: -(rates.get(row.name) or 0.0),
    }
    key = keys[page.sort]
    taken = [row for row in rows if page.takes(row.name, row.state)]
    taken.sort(key=lambda row: (key(row), -row.running, row.name))
    if not page.sort:
        taken.sort(key=lambda row: row.state in FINE)
    return taken


def _by_age(row: Activity | Group) -> float:
    """Requests are numbered in order of arrival."""
    return NEVER_NS if row.oldest is None else row.oldest.id


def groups_in_order(groups: Iterable[Group], page: Page) -> list[Group]:
    """Return the groups that the page's filter takes, sorted; all groups of a name have the same rate."""
    keys: dict[str, Callable[[Group], float | tuple[str, ...]]] = {
        "name": _names_of,
        "waiting": lambda group: -group.waiting,
        "running": lambda group: -group.running,
        "tokens": lambda group: -group.tokens,
    }
    key = keys.get(page.sort, _by_age)
    taken = [group for group in groups if page.takes(group.adapter or "base model", group.tenant, group.backend)]
    return sorted(taken, key=lambda group: (key(group), -group.running, *_names_of(group)))


def _names_of(group: Group) -> tuple[str, ...]:
    return group.adapter, group.tenant, group.backend


def adapter_activities(state: State, groups: Iterable[Group]) -> list[Activity]:
    """Return every registered name, and the base model while it has requests."""
    active = activities(groups, lambda group: group.adapter)
    return [*active.values(), *(Activity(name) for name in state.names if name not in active)]


def backend_activities(state: State, groups: Iterable[Group]) -> list[Activity]:
    """Return every backend."""
    active = activities(groups, lambda group: group.backend)
    rows = [active.get(backend) or Activity(backend) for backend in state.backends]
    for row in rows:
        row.state = state_of(state, state.backends[row.name])
    return rows


@dataclass(frozen=True)
class Copies:
    """Where a version is: on how many backends, and in the host store ("memory", "disk", "fetching" or "")."""

    on_gpu: int = 0
    in_engine_host: int = 0
    loading: int = 0
    store: str = ""


def copies_of(state: State, digests: Iterable[str]) -> dict[str, Copies]:
    """Return where some versions are. The store is walked once for all of them."""
    stored: dict[str, str] = {}
    for tier, store in (("disk", state.disk), ("memory", state.store)):
        for entry in store.entries.values():
            stored[entry.digest] = tier if entry.ready else stored.get(entry.digest, "fetching")
    return {digest: _copies(state, digest, stored.get(digest, "")) for digest in digests if digest != BASE}


def _copies(state: State, digest: str, store: str) -> Copies:
    tiers = [backend.shadow.tier(digest) for backend in state.backends.values()]
    version = state.versions.get(digest)
    return Copies(
        on_gpu=tiers.count("gpu"),
        in_engine_host=tiers.count("engine_host"),
        loading=0 if version is None else len(version.loads),
        store=store,
    )
