"""The believed contents of an engine's adapter caches, kept by replaying what the sidecar made the engine do.

The engine reports no evictions, so each backend gets a shadow of its two caches: pages, and eviction by least recent
*completion*. It is written from TensorRT-LLM's behaviour and apart from the emulator's model. A belief is a hint: a
miss error corrects it, at the price of one retry.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Belief:
    """One version in one cache. `since_ns` and `source` give the age and the evidence of the belief."""

    pages: int
    since_ns: int
    source: str
    running: int = 0


@dataclass(slots=True)
class CacheShadow:
    """One page cache. With `pages_total` None its size is unknown, and nothing is ever believed evicted."""

    pages_total: int | None = None
    held: dict[str, Belief] = field(default_factory=dict)
    """In order of completion: the first idle one is evicted next."""
    evictions: int = 0

    def __contains__(self, version: str) -> bool:
        return version in self.held

    def put(self, version: str, pages: int, now_ns: int, source: str, running: int = 0) -> list[str]:
        """Believe that a version came in while `running` requests of it run; return what the engine evicted for it."""
        if version in self.held:
            return []
        evicted = self._make_room(pages)
        self.held[version] = Belief(pages, now_ns, source, running)
        return evicted

    def begin(self, version: str) -> None:
        """Note that a request of the version runs, so that it cannot be evicted."""
        belief = self.held.get(version)
        if belief is not None:
            belief.running += 1

    def end(self, version: str) -> None:
        """Note that a request of the version completed: it is now the most recent of the idle ones."""
        belief = self.held.pop(version, None)
        if belief is not None:
            belief.running = max(0, belief.running - 1)
            self.held[version] = belief

    def forget(self, version: str) -> None:
        self.held.pop(version, None)

    def forget_idle(self) -> list[str]:
        """Forget all versions without running requests, and return them."""
        idle = [version for version, belief in self.held.items() if not belief.running]
        for version in idle:
            del self.held[version]
        return idle

    def clear(self) -> None:
        self.held.clear()

    @property
    def pages_held(self) -> int:
        return sum(belief.pages for belief in self.held.values())

    def _make_room(self, pages: int) -> list[str]:
        if self.pages_total is None:
            return []
        evicted: list[str] = []
        excess = self.pages_held + pages - self.pages_total
        for version, belief in list(self.held.items()):
            if excess <= 0:
                break
            if not belief.running:
                del self.held[version]
                evicted.append(version)
                self.evictions += 1
                excess -= belief.pages
        return evicted


@dataclass(slots=True)
class EngineShadow:
    """The engine's host cache, which decides whether weights must be sent, and its device cache above it."""

    host: CacheShadow = field(default_factory=CacheShadow)
    device: CacheShadow = field(default_factory=CacheShadow)

    def loaded(self, version: str, pages: int, now_ns: int, running: int = 0) -> list[str]:
        """Believe that a Load succeeded; return the versions evicted from the host cache for it.

        `running` requests of the version already run if it was loaded again after a miss that hit only some of them.
        """
        evicted = self.host.put(version, pages, now_ns, "load", running)
        for gone in evicted:
            self.device.forget(gone)
        self.device.put(version, pages, now_ns, "load", running)
        return evicted

    def began(self, version: str, pages: int, now_ns: int) -> None:
        if version in self.host:
            self.device.put(version, pages, now_ns, "answer")
        self.host.begin(version)
        self.device.begin(version)

    def ended(self, version: str) -> None:
        self.host.end(version)
        self.device.end(version)

    def forget(self, version: str) -> None:
        self.host.forget(version)
        self.device.forget(version)

    def forget_idle(self) -> list[str]:
        """Forget all versions without running requests; return those that the host cache held."""
        self.device.forget_idle()
        return self.host.forget_idle()

    def clear(self) -> None:
        self.host.clear()
        self.device.clear()

    def tier(self, version: str) -> str | None:
        """Return the tier of a version: "gpu", "engine_host" or None."""
        if version in self.device:
            return "gpu"
        return "engine_host" if version in self.host else None
