"""Questions to vLLM's OpenAI server besides generating, and the meaning of its answers (texts of 0.32 and 0.33)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.gauges import count_of, sum_of
from sidecar.backends.http_client import Reply, WireError
from sidecar.backends.openai.run import epoch_header, message_of
from sidecar.backends.openai.server import PROBE_TIMEOUT_S, OpenAiServer
from sidecar.core.enums import Fault
from sidecar.errors import Misused, Reason

OLDEST = (0, 32)
"""In older versions a load under traffic could serve another adapter's weights (vllm#47724)."""
NO_SUCH_MODEL = re.compile(r"The model `.*` does not exist")
NOT_ENABLED = re.compile(r"LoRA is not enabled|not started with LoRA")
ALREADY = re.compile(r"is already loaded|has already been loaded")
DEATHS = (
    "EngineCore encountered an issue",
    "The server had an error while processing your request",
    "engine core reported fatal failure",
)
"""The texts that tell of a dead engine: of 0.32, of 0.33, and of the Rust front end of either."""
INSIDE = "vllm:num_requests_running", "vllm:num_requests_waiting"
STEPS, GENERATED, KV_USED = (
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:kv_cache_usage_perc",
)
CACHE, ADAPTERS, STARTED_AT = "vllm:cache_config_info", "vllm:lora_requests_info", "process_start_time_seconds"
TRIAL, INFO_TIMEOUT_S = "lora-sidecar-trial", 30.0
"""A name that is never loaded; time for what a server in development mode says of itself: at first it looks around."""
READ = (*INSIDE, STEPS, GENERATED, KV_USED, CACHE, ADAPTERS, STARTED_AT)
"""What is parsed of a scrape: most of its lines are histograms, and each takes as long."""
REMOVAL_REFUSED = "engine rejected removal of LoRA adapter"
"""The Rust front end's, when the engine has dropped the adapter from its memory: the name stays."""


@dataclass(frozen=True)
class Measures:
    """Values of the metrics: steps and generated tokens so far, KV tokens in total and in use, adapter slots, the
    process's start time, and the requests that run or wait in the engine.

    None for a value that is not published. The Rust front end publishes no KV tokens, no slots and no start time.
    """

    steps: int | None = None
    generated: int | None = None
    kv_tokens: int | None = None
    kv_used: int | None = None
    slots: int | None = None
    started_at: float | None = None
    inside: int | None = None
    has_lora: bool = False
    """They have a family for adapters, whose samples come with the first answer: it was started with LoRA."""


@dataclass(frozen=True)
class Version:
    """What a server says of itself: vLLM's version, and whether its Rust front end answers."""

    number: str
    is_rust: bool = False

    def __str__(self) -> str:
        return f"vLLM {self.number}{', Rust front end' if self.is_rust else ''}"


@dataclass(frozen=True)
class Served:
    """The base model's name on the server, its longest sequence, and the adapters' names with their folders."""

    base: str
    sequence_tokens_max: int | None
    adapters: dict[str, str]


class VllmApi(OpenAiServer):
    """One server."""

    async def version(self) -> Version:
        """Return the server's version. Raises Misused if it is no vLLM."""
        reply = await self._client.get("/version", PROBE_TIMEOUT_S)
        found = version_of(reply.body)
        if found is None:
            raise Misused(
                Reason.BACKEND_UNREACHABLE, f"{self._backend}: /version answers {reply.status}: this is no vLLM"
            )
        return found

    async def models(self) -> Served:
        """Return what is served. Raises Misused if the answer is not vLLM's."""
        reply = await self._client.get("/v1/models", PROBE_TIMEOUT_S)
        try:
            entries = reply.json()["data"]
            bases = [entry for entry in entries if not entry.get("parent")]
            adapters = {entry["id"]: str(entry.get("root") or "") for entry in entries if entry.get("parent")}
            return Served(bases[0]["id"], bases[0].get("max_model_len"), adapters)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Misused(
                Reason.BACKEND_UNREACHABLE,
                f"{self._backend}: /v1/models answers {reply.status}: {reply.text[:200]}",
            ) from error

    async def measures(self) -> Measures:
        """Return the metrics' values; all None if there are no metrics, which does not make the engine lost."""
        try:
            reply = await self._client.get("/metrics", PROBE_TIMEOUT_S)
            return parse(reply.text) if reply.is_ok else Measures()
        except (WireError, ValueError):
            return Measures()

    async def lora_config(self) -> Mapping[str, Any] | None:
        """Return what LoRA it was started with, {} if without; None if it does not say, as it does for developers only.

        See VLLM_SERVER_DEV_MODE.
        """
        try:
            reply = await self._client.get("/server_info?config_format=json", INFO_TIMEOUT_S)
            return reply.json()["vllm_config"]["lora_config"] or {}
        except (WireError, ValueError, KeyError, TypeError):
            return None

    async def why_no_adapters(self, folder: str, has_lora: bool) -> str:
        """Return why it takes no adapter at all, "" if nothing is known.

        It is asked for loads that must fail: of one without a name and, unless it is known that it `has_lora`, of a
        folder without an adapter, about which the engine itself complains in its log. Raises WireError.
        """
        reply = await self.load("", "", PROBE_TIMEOUT_S)
        if reply.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return "it has no /v1/load_lora_adapter; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if not has_lora:
            reply = await self.load(TRIAL, folder, PROBE_TIMEOUT_S)
        is_without = NOT_ENABLED.search(message_of(reply.body)) is not None
        return "it was started without LoRA; start it with --enable-lora" if is_without else ""

    async def load(self, name: str, path: str, timeout_s: float, epoch: int = 0, *, in_place: bool = False) -> Reply:
        body: dict[str, Any] = {"lora_name": name, "lora_path": path}
        if in_place:
            body["load_inplace"] = True
        return await self._client.post("/v1/load_lora_adapter", body, timeout_s, epoch_header(epoch))

    async def unload(self, name: str, timeout_s: float) -> Reply:
        return await self._client.post("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s)

    async def forget(self, name: str, path: str, timeout_s: float) -> bool:
        """Make the server forget an adapter that it has from `path`; return False if it keeps the name.

        The Rust front end keeps a name whose adapter the engine has dropped from its memory. Loaded again from where it
        is, it can be removed.
        """
        reply = await self.unload(name, timeout_s)
        if REMOVAL_REFUSED in message_of(reply.body):
            await self.load(name, path, timeout_s, in_place=True)
            reply = await self.unload(name, timeout_s)
        return reply.status in (HTTPStatus.OK, HTTPStatus.NOT_FOUND)  # not found: it is gone already

    async def answer_once(self, model: str, timeout_s: float) -> None:
        """Make the engine answer one token; an error of its own is an answer, too. Raises WireError."""
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        await self._client.post("/v1/completions", body, timeout_s)


def version_of(body: bytes) -> Version | None:
    """Return what the body of `/version` says; None if it is not vLLM's."""
    try:
        record = json.loads(body)
        return Version(str(record["version"]), "rust_frontend_version" in record) if record["version"] else None
    except (ValueError, KeyError, TypeError):
        return None


def parse(text: str) -> Measures:
    """Return the values used of a scrape's text. Raises ValueError if it is malformed."""
    lines = "\n".join(line for line in text.splitlines() if line.startswith(READ)) + "\n"
    samples = [sample for family in text_string_to_metric_families(lines) for sample in family.samples]
    found: dict[str, float] = {}
    kv_tokens = None
    inside: list[float] = []
    generated: list[float] = []
    newest, slots = 0.0, None
    for sample in samples:
        found[sample.name] = sample.value
        if sample.name in INSIDE:
            inside.append(sample.value)
        if sample.name == GENERATED:
            generated.append(sample.value)
        if sample.name.startswith(CACHE):
            kv_tokens = _kv_tokens(sample.labels)
        if sample.name.startswith(ADAPTERS) and sample.value >= newest:
            newest, slots = sample.value, _whole(sample.labels.get("max_lora"))
    usage = found.get(KV_USED)
    kv_used = None if usage is None or kv_tokens is None else count_of(usage * kv_tokens)
    return Measures(
        steps=count_of(found.get(STEPS)),
        generated=sum_of(generated),
        kv_tokens=kv_tokens,
        kv_used=kv_used,
        slots=slots or None,
        started_at=found.get(STARTED_AT),
        inside=sum_of(inside),
        has_lora=f"# TYPE {ADAPTERS} " in text,
    )


def _kv_tokens(labels: dict[str, str]) -> int | None:
    blocks, size = _whole(labels.get("num_gpu_blocks")), _whole(labels.get("block_size"))
    return blocks * size if blocks and size else None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def is_too_old(version: str) -> bool:
    """Return True if a version is too old to load under traffic; False if it cannot be parsed."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST


def tells_of_death(text: str, wrote: Wrote = nobody_wrote) -> bool:
    """Return True if a server's error tells that its engine is dead."""
    return any(death in text and not wrote(death) for death in DEATHS)


def fault_of(status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
    """Return the fault of a generating request's error.

    An unknown 5xx is REJECTED, which says nothing about the engine's health: ask `/health`. A 4xx never does.
    """
    is_dead = status >= HTTPStatus.INTERNAL_SERVER_ERROR and tells_of_death(text, wrote)
    if is_dead or status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Fault.LOST
    if status == HTTPStatus.NOT_FOUND and NO_SUCH_MODEL.search(text):
        return Fault.MISS
    return Fault.REJECTED
