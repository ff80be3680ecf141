"""Metrics under vLLM's names, at `/metrics/model-server`, for endpoint pickers and for dashboards made for vLLM.

To a picker this process is one model server, and it reads the first series of a family. So queues and caches have one
series for each base model, whatever the number of engines; only residency has one for each engine. Adapters have the
names that clients send. What is not known has no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import time

from prometheus_client.core import Metric as Family

from sidecar.backends.registry import base_names
from sidecar.core import eligibility
from sidecar.core.enums import Phase
from sidecar.core.state import Backend, State
from sidecar.shell.series import LOAD_BUCKETS_S, Page, Series
from sidecar.shell.state_gauges import Samples, family

UNNAMED_BASE = "base"
"""The name of a base model that no engine names; clients may always use it."""
Pools = dict[str, list[Backend]]
"""The backends whose queues this process has, by their base model."""


class ModelServer:
    """The page of one process. `clock` returns the time in seconds since 1970."""

    def __init__(self, state: State, clock: Callable[[], float] = time) -> None:
        self._state = state
        self._clock = clock
        self._page = Page()
        self._loads = Series("lora_adapter_load_seconds", self._page.registry, LOAD_BUCKETS_S)
        self._kv_used: dict[str, int] = {}
        """KV tokens in use at the engines that tell it, as last measured."""

    async def render(self, accept: str = "") -> tuple[str, bytes]:
        """Return content type and text in the format that an Accept header asks for."""
        return await self._page.render(self._families, accept)

    def measured(self, backend: str, kv_used: int | None) -> None:
        self._kv_used.pop(backend, None)
        if kv_used is not None:
            self._kv_used[backend] = kv_used

    def loaded(self, backend: str, took_ns: int) -> None:
        """Record how long an engine took to load an adapter."""
        self._loads.take(took_ns, backend, _base_of(self._state.backends[backend]), "load")

    def lost(self, backend: str) -> None:
        self._kv_used.pop(backend, None)

    def removed(self, backend: str) -> None:
        """End the series of a backend that is gone: names of pods are never used again."""
        self.lost(backend)
        self._loads.end(backend)

    def _families(self) -> list[Family]:
        pools = _pools_of(self._state)
        up = [backend for pool in pools.values() for backend in pool if _has_adapters(backend)]
        return [
            family("num_requests_waiting", [((base,), count) for base, count in self._waiting(pools).items()]),
            family("num_requests_running", [((base,), _running(pool)) for base, pool in pools.items()]),
            family("kv_cache_usage_perc", self._kv_usage(pools)),
            family("lora_requests_info", self._requests_info(pools)),
            family("lora_adapter_loaded", (sample for backend in up for sample in self._residents(backend))),
            family("num_gpu_loaded_lora_adapters", [(_labels(b), len(b.shadow.device.held)) for b in up]),
            family(
                "num_cpu_loaded_lora_adapters",
                [(_labels(b), len(b.shadow.host.held)) for b in up if not b.facts.host_pages_assumed],
            ),
            family("max_gpu_lora_adapters", [(_labels(b), slots) for b in up if (slots := _slots(b)) is not None]),
        ]

    def _waiting(self, pools: Pools) -> dict[str, int]:
        counts = {base: sum(len(backend.queued) for backend in pool) for base, pool in pools.items()}
        for request in self._state.unrouted:
            counts[self._base_for(request, pools)] += 1
        return counts

    def _base_for(self, request: int, pools: Pools) -> str:
        """Return the base model of a request that waits for a backend to come up."""
        servers = eligibility.servers_for(self._state, self._state.requests[request])
        return next((base for server in servers if (base := _base_of(server)) in pools), next(iter(pools)))

    def _kv_usage(self, pools: Pools) -> Samples:
        for base, pool in pools.items():
            known = [(self._kv_used.get(backend.id), backend.facts.kv_tokens) for backend in pool if _is_up(backend)]
            sizes = [(used, size) for used, size in known if used is not None and size]
            if sizes and len(sizes) == len(known):
                yield (base,), sum(used for used, _ in sizes) / sum(size for _, size in sizes)

    def _requests_info(self, pools: Pools) -> Samples:
        for base, pool in pools.items():
            engines = [backend for backend in pool if _has_adapters(backend)]
            if not engines:
                continue
            running = {name: None for backend in engines for name in self._names(backend.shadow.device.held)}
            queued = (name for backend in pool for name in self._names(backend.queued_by_version))
            waiting = {name: None for name in queued if name not in running}
            slots = [_slots(backend) for backend in engines]
            most = "" if None in slots else str(sum(each or 0 for each in slots))
            yield (base, most, ",".join(running), ",".join(waiting)), self._clock()

    def _residents(self, backend: Backend) -> Samples:
        """Yield one series for each name, however many of its versions are there: its best level, pinned if one is.

        The rank is that of the version which is there at this level, the largest of its modules.
        """
        levels: dict[str, tuple[str, int]] = {}
        pinned = set()
        for held, level in ((backend.shadow.host.held, "cpu"), (backend.shadow.device.held, "gpu")):
            for digest in held:
                for name in self._names((digest,)):
                    levels[name] = level, self._state.versions[digest].adapter.rank_max
                    if self._state.names[name].pins(digest):
                        pinned.add(name)
        labels = _labels(backend)
        for name, (level, rank) in levels.items():
            yield (*labels, name, level, str(name in pinned).lower(), str(rank)), 1

    def _names(self, digests: Iterable[str]) -> Iterator[str]:
        """Yield the names that now stand for some versions."""
        for digest in digests:
            if digest in self._state.versions:
                yield from self._state.versions[digest].names


def _pools_of(state: State) -> Pools:
    pools: Pools = {}
    for backend in state.backends.values():
        if backend.owned:
            pools.setdefault(_base_of(backend), []).append(backend)
    return pools or {UNNAMED_BASE: []}


def _base_of(backend: Backend) -> str:
    """Return the base model's name, as `/v1/models` has it."""
    return next(iter(base_names(backend.facts)), UNNAMED_BASE)


def _labels(backend: Backend) -> tuple[str, str]:
    return backend.id, _base_of(backend)


def _running(pool: list[Backend]) -> int:
    return sum(len(backend.running) for backend in pool)


def _is_up(backend: Backend) -> bool:
    return backend.phase is Phase.UP


def _has_adapters(backend: Backend) -> bool:
    return _is_up(backend) and not backend.facts.base_only


def _slots(backend: Backend) -> int | None:
    """Return how many adapters an engine has at once on its GPU, of the size of the largest there; None if unknown."""
    if backend.facts.device_pages is None:
        return None
    pages = max((belief.pages for belief in backend.shadow.device.held.values()), default=1)
    return max(1, eligibility.page_limit(backend) // max(1, pages))
