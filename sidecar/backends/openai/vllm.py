"""vLLM's OpenAI server (texts and gauges of 0.32 and 0.33), its Rust front end included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from sidecar.adapters.base_model import read_base_model
from sidecar.backends.api import HttpForm
from sidecar.backends.checks.finding import Finding, failed, ok, warning
from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.gauges import count_of, sum_of
from sidecar.backends.http_client import Reply, WireError
from sidecar.backends.kind import Ask, Asking, ModelKind, Native
from sidecar.backends.openai.asking import IdsReader, completion
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.paths import ROWS
from sidecar.backends.openai.server import PROBE_TIMEOUT_S, OpenAiServer
from sidecar.config.backends import Backend as Entry
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts
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
SIZES_UNKNOWN = (
    "the sizes of its base model are not known: vLLM takes an adapter of smaller ones in silence and answers wrongly, "
    "so it is tried with loads that it must refuse, which its log tells of; over several GPUs not all sizes are found"
)
RUST_BODY_BYTES_MAX = 32 << 20
"""What its Rust front end takes, unless VLLM_HTTP_MAX_REQUEST_BODY_SIZE says otherwise."""


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, return_token_ids=True, **({} if ask.salt is None else {"cache_salt": ask.salt}))


MODEL = ModelKind(
    name="vllm",
    title="vLLM",
    native=Native.OPENAI,
    asking=Asking(_write, lambda ask: "", IdsReader),
    paths=tuple(ROWS),
    salted=tuple(ROWS),
    reads_files=True,
    page_is_adapter=True,
    pages="the engine keeps {host} in memory (max_cpu_loras) and has {device} slots (max_loras)",
)
_PACKED = "nothing is packed for vLLM; base_model.config says what adapters are checked against"


class VllmEntry(Entry):
    """A vLLM server, by `vllm://HOST:PORT`; `vllms://HOST:PORT` by TLS, this machine's CAs trusted unless others are
    named. `api_key_file` has the key that it wants, `old_versions` uses it though it may answer by another adapter.
    """

    SCHEMES: ClassVar = {"vllm": False, "vllms": True}
    ELSEWHERE: ClassVar = {
        "triton://": {
            "model": "vLLM serves one model, and is asked what it calls it",
            "text_model": "vLLM takes text and tokens by one model",
            "models": "vLLM serves one model, and is asked what it calls it",
            "metrics": "vLLM's metrics are at its own url, under /metrics",
            "weights_transport": "vLLM reads adapters' files itself, from adapters_dir",
            "engine.config": "it names TensorRT-LLM's config.json; what vLLM was started with is said by "
            "engine.device_pages (--max-loras), engine.host_pages (--max-cpu-loras), engine.seats (--max-num-seqs) and "
            "engine.rank_max (--max-lora-rank)",
            "engine.modules": "nothing is packed for vLLM: what a page holds there is one adapter",
            "engine.rank_multiple": "nothing is packed for vLLM",
            "engine.tp": "nothing is packed for vLLM, which splits adapters itself",
            "engine.heads": _PACKED,
            "engine.kv_heads": _PACKED,
            "engine.head_size": _PACKED,
        }
    }

    api_key_file: str | None = None
    old_versions: bool = False

    def files(self) -> dict[str, str | None]:
        return super().files() | {"api_key_file": self.api_key_file}


class Version(NamedTuple):
    """vLLM's version, and whether its Rust front end answers."""

    number: str
    is_rust: bool = False

    def __str__(self) -> str:
        return f"vLLM {self.number}{', Rust front end' if self.is_rust else ''}"


class Vllm(Dialect):
    """A registering server. Its Rust front end publishes no KV tokens, no slots and no start time."""

    model = MODEL
    section = VllmEntry
    start = "vllm serve …"
    host_is_slots = True
    sizes_unknown = SIZES_UNKNOWN
    refuses_nameless = True
    no_files = re.compile(r"No adapter found|path must exist and be accessible")
    ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    metrics_fix = "vllm serve without --disable-log-stats, and have a proxy pass /metrics on"
    enable = "vllm serve … --enable-lora --max-loras N --max-cpu-loras M --max-lora-rank R"

    async def recognise(self, server: OpenAiServer) -> Version:
        reply = await server.get("/version")
        try:
            record = reply.json()
            if record["version"]:
                return Version(str(record["version"]), "rust_frontend_version" in record)
        except (ValueError, KeyError, TypeError):
            pass
        raise server.unusable(f"it answers {reply.status} to /version: no vLLM, or a proxy that does not pass it on")

    def judged_version(self, version: Version, is_used: bool) -> Finding:
        number, oldest = version.number, ".".join(map(str, OLDEST))
        if not is_too_old(number):
            return ok(f"{number}, and {oldest} is needed")
        text = (
            f"{number} can answer with another adapter's weights while one is loaded (vllm#47724), and is "
            f"{'used all the same' if is_used else 'refused'}"
        )
        upgrade = f"pip install -U 'vllm>={oldest}', or an image of vllm/vllm-openai:v{oldest}.0 or newer"
        if is_used:
            return warning(f"{text}: old_versions is true", upgrade)
        instead = "or config.yaml: old_versions: true   (if adapters are never loaded under traffic)"
        return failed(text, upgrade, instead)

    async def identify(self, server: OpenAiServer, entry: VllmEntry) -> Found:
        version = await self.recognise(server)
        if is_too_old(version.number) and not entry.old_versions:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"{server.backend}: {version} can answer with another adapter's weights while one is loaded "
                "(vllm#47724); upgrade to 0.32 or newer, or set old_versions: true to use it all the same",
            )
        return Found(
            await self.served(server),
            str(version),
            paths=await server.paths(),
            body_bytes_max=RUST_BODY_BYTES_MAX if version.is_rust else None,
            unloads="weights" if version.is_rust else "name",
        )

    async def examine(
        self,
        server: OpenAiServer,
        found: Found,
        entry: VllmEntry,
        declared: EngineFacts,
        must_answer: bool,
        patience_s: float,
    ) -> Found:
        seen, config = await self.measures(server), await self.lora_config(server) or {}
        has_lora, takes_none = seen.has_lora or bool(config), ""
        if entry.shared_dir is not None:
            takes_none = await self.why_no_adapters(server, entry.shared_dir.engine, has_lora)
        is_told = seen.slots or (declared.device_pages and not has_lora)
        if must_answer or not (is_told or takes_none):
            await server.ask(self.one_token(found.served.base), patience_s)
            seen = await self.measures(server)  # the slots are published from the first answer on
        return replace(
            found,
            measures=seen,
            slots=seen.slots or config.get("max_loras"),
            host_pages=config.get("max_cpu_loras"),
            rank_max=config.get("max_lora_rank"),
            takes_none=takes_none,
        )

    async def lora_config(self, server: OpenAiServer) -> Mapping[str, Any] | None:
        """Return what LoRA it was started with, {} if without; None if it does not say, as it does for developers only.

        See VLLM_SERVER_DEV_MODE.
        """
        try:
            reply = await server.get("/server_info?config_format=json", INFO_TIMEOUT_S)
            return reply.json()["vllm_config"]["lora_config"] or {}
        except (WireError, ValueError, KeyError, TypeError):
            return None

    async def why_no_adapters(self, server: OpenAiServer, folder: str, has_lora: bool) -> str:
        """Return why it takes no adapter at all, "" if nothing is known.

        Two loads that must fail are tried. The first has no name. The second names a folder without an adapter, and
        the engine complains of it in its log; it is left out if the server is known to have LoRA (`has_lora`). Raises
        WireError.
        """
        reply = await self.load(server, "", "", PROBE_TIMEOUT_S)
        if reply.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return f"it has no {self.load_path}; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if not has_lora:
            reply = await self.load(server, TRIAL, folder, PROBE_TIMEOUT_S)
        is_without = NOT_ENABLED.search(message_of(reply.body)) is not None
        return "it was started without LoRA; start it with --enable-lora" if is_without else ""

    async def measures(self, server: OpenAiServer) -> Measures:
        try:
            reply = await server.get("/metrics")
            return parse(reply.text) if reply.is_ok else Measures()
        except (WireError, ValueError):
            return Measures()

    def fault_of(self, status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
        """A 4xx never tells that the engine is dead."""
        is_dead = status >= HTTPStatus.INTERNAL_SERVER_ERROR and tells_of_death(text, wrote)
        if is_dead or status == HTTPStatus.SERVICE_UNAVAILABLE:
            return Fault.LOST
        if status == HTTPStatus.NOT_FOUND and NO_SUCH_MODEL.search(text):
            return Fault.MISS
        return Fault.REJECTED

    def is_loaded(self, reply: Reply) -> bool:
        is_there = reply.status == HTTPStatus.BAD_REQUEST and ALREADY.search(message_of(reply.body)) is not None
        return reply.is_ok or is_there

    async def forget(self, server: OpenAiServer, name: str, path: str, timeout_s: float) -> bool:
        """The Rust front end keeps a name whose adapter the engine has dropped from its memory. Loaded again from where
        it is, it can be removed.
        """
        reply = await self.unload(server, name, timeout_s)
        if REMOVAL_REFUSED in message_of(reply.body):
            body = {"lora_name": name, "lora_path": path, "load_inplace": True}
            await server.client.post(self.load_path, body, timeout_s)
            reply = await self.unload(server, name, timeout_s)
        return reply.status in (HTTPStatus.OK, HTTPStatus.NOT_FOUND)

    def tries_fit(self, entry: VllmEntry) -> bool:
        """Adapters are tried where the model's sizes are not known, or a model's parts have two names."""
        named = None if entry.base_model is None else entry.base_model.config
        is_known = named is not None and not read_base_model(Path(named).expanduser()).is_multimodal
        return entry.shared_dir is not None and not is_known

    def notes(self, entry: VllmEntry, declared: EngineFacts) -> Iterator[str]:
        from sidecar.backends.openai.checks.declared import undeclared

        return undeclared(self, declared, entry.adapters_dir is not None)


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


DIALECT = Vllm()
