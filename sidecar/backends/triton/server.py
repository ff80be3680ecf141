"""Watch one Triton server: what it is when it is reached, whether it has changed since, and whether it lives."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import Any

import grpc

from sidecar.backends.engine_facts import from_llmapi_config, from_model_config, merge, unknown_phrase
from sidecar.backends.faults import classify
from sidecar.backends.pulse import Pulse
from sidecar.backends.triton.counting import Tells
from sidecar.backends.triton.dialects import Dialect, TensorRtLlm, dialect_of
from sidecar.backends.triton.entry import GRPC_PORT, TritonEntry
from sidecar.backends.triton.gauges import Gauges, Scraper
from sidecar.backends.triton.probe import Probe
from sidecar.backends.triton.transport import Transport
from sidecar.core.enums import Fault
from sidecar.core.events import BackendMeasured
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused

CHANGED = "its model's configuration has changed"


class Server:
    """The server of one backend. `stub` is its KServe stub."""

    def __init__(self, entry: TritonEntry, declared: EngineFacts, stub: Any, transport: Transport) -> None:
        self._entry = entry
        self._declared = declared
        self._transport = transport
        self._probe = Probe(entry.identity, entry.address, entry.model, stub)
        self._scraper = Scraper(entry.metrics_url, entry.model) if entry.metrics_url else None
        self._config = b""
        self._core: Any = None
        self._tells: dict[str, Tells] = {}
        self._unknown = ""
        self._caches = 1
        self._distrusted = False
        self.decoupled = True
        self.dialect: Dialect = TensorRtLlm()
        self.gauges: Gauges | None = None
        self.pulse = Pulse(entry.progress_timeout_s, monotonic())

    async def close(self) -> None:
        if self._scraper is not None:
            await self._scraper.close()

    def detail(self) -> str:
        """Return a phrase for operators about a server that is up."""
        url = self._entry.metrics_url
        nowhere = f"; no metrics: backends[].metrics names their URL where gRPC is not at port {GRPC_PORT}"
        metrics = nowhere if url is None else f"; {url} has no metrics"
        caches = "" if self._caches == 1 else f"; CACHES {self._caches}, not addressable: {self._remedy}"
        known = "" if self.gauges is not None else metrics
        return f"reached, {self._transport.summary}{known}{caches}{self._unknown}"

    @property
    def _remedy(self) -> str:
        if self._transport.by_reference:
            return "weights go along with every request; one instance for each model and one backend for each would not"
        return "requests meet a cache without their adapter; set instance_group count to 1, or share /dev/shm"

    async def ready(self) -> None:
        """Return if the model is ready. Raises Misused, grpc.RpcError."""
        await self._probe.ready()

    async def reach(self) -> EngineFacts:
        """Return the facts of the server. Raises Misused if it cannot be used, grpc.RpcError if it is unreachable."""
        await self._probe.ready()
        config = await self._probe.config()
        self.dialect = dialect_of(config, self._entry.shared_dir)
        self.decoupled = config.model_transaction_policy.decoupled
        if self._distrusted:
            await self._probe.answer_once(self.dialect, self.decoupled)
        found = await self._facts_of(config)
        reads_files = not isinstance(self.dialect, TensorRtLlm)
        declared = replace(
            self._declared,
            kind=self.dialect.kind,
            reads_files=reads_files,
            base_only=reads_files and not self.dialect.serves_adapters,
            unloads="nothing" if reads_files else "",
        )
        facts = merge(self._entry.identity, declared, found)
        self.pulse.begin(monotonic())
        self._core, self._tells = config, {}
        self.gauges = None
        await self.measure()
        facts = self._with_gauges(facts)
        self._config, self._distrusted = config.SerializeToString(deterministic=True), False
        self._unknown, self._caches = unknown_phrase(facts), facts.caches
        return facts

    async def _facts_of(self, config: Any) -> EngineFacts:
        if not isinstance(self.dialect, TensorRtLlm):
            return from_llmapi_config()
        await self._transport.choose()
        found = from_model_config(config)
        return self._transport.described(found)

    def _with_gauges(self, facts: EngineFacts) -> EngineFacts:
        gauges = self._gauges_of_all(facts.caches)
        return replace(facts, seats=facts.seats or gauges.seats, kv_tokens=facts.kv_tokens or gauges.kv_tokens)

    def _gauges_of_all(self, caches: int) -> Gauges:
        """Return the gauges for all instances: each has a batch of its own, and published are those of one."""
        gauges = self.gauges or Gauges()
        seats, kv_tokens = gauges.seats and gauges.seats * caches, gauges.kv_tokens and gauges.kv_tokens * caches
        return replace(gauges, seats=seats, kv_tokens=kv_tokens, kv_used=gauges.kv_used if caches == 1 else None)

    def measured(self) -> BackendMeasured | None:
        """Return the engine's capacity and load; None if they are unknown."""
        if self.gauges is None:
            return None
        gauges, facts = self._gauges_of_all(self._caches), self._declared
        return BackendMeasured(
            self._entry.identity, facts.seats or gauges.seats, facts.kv_tokens or gauges.kv_tokens, gauges.kv_used
        )

    async def measure(self) -> bool:
        """Read the gauges; return True if they show that the engine has restarted."""
        gauges = None if self._scraper is None else await self._scraper.scrape()
        if gauges is None:
            return False
        restarted = self.pulse.counted(gauges.iterations, monotonic()) and self._caches == 1
        self.gauges = gauges
        return restarted

    async def tells(self, model: str) -> Tells:
        """Return what a model tells of its tokens: nothing, if the server has it not, or does not say."""
        if model not in self._tells:
            try:
                self._tells[model] = Tells.of(await self._probe.config(model), self._core)
            except (Misused, grpc.RpcError):
                return Tells()
        return self._tells[model]

    async def changed(self) -> bool:
        """Return True if the model's configuration has changed since it was reached. Raises Misused, grpc.RpcError."""
        config = await self._probe.config()
        return bool(config.SerializeToString(deterministic=True) != self._config)

    async def look(self) -> str | None:
        """Return why a server that is up must be treated as a new one, None if it need not. Raises grpc.RpcError."""
        restarted = await self.measure()
        try:
            await self._probe.ready()
            changed = await self.changed()
        except Misused as unready:
            return unready.message
        self.pulse.seen(monotonic())
        self._tells.clear()
        if restarted:
            return "it has restarted: its iteration counter went back"
        return CHANGED if changed else None

    def distrust(self) -> None:
        """Trust a lost engine again only once it has answered a token."""
        self._distrusted = True

    async def steps(self) -> int | None:
        """Return the engine's step count; None if its metrics lack it or cannot be read."""
        gauges = None if self._scraper is None else await self._scraper.scrape()
        return None if gauges is None else gauges.iterations

    async def inside(self) -> int | None:
        """Return how many requests the engine has; None if its metrics lack it, or are of one of several instances."""
        gauges = None if self._scraper is None or self._caches != 1 else await self._scraper.scrape()
        return None if gauges is None else gauges.inside

    @property
    def seen_inside(self) -> int | None:
        return self.gauges.inside if self.gauges is not None and self._caches == 1 else None

    async def answers(self, within_s: float) -> bool:
        """Return True if the engine answers a request of ours for one token."""
        try:
            await self._probe.answer_once(self.dialect, self.decoupled, within_s)
        except Misused as error:
            return classify(error.message) is not Fault.LOST  # any other error is an answer
        except grpc.RpcError:
            return False
        return True
