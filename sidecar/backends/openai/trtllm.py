"""trtllm-serve, TensorRT-LLM's OpenAI server with the PyTorch engine.

It answers nearly every failure with status 400, so an error is classified by its text: those of 1.2.1 and of 1.3.0rc22
and later. It refuses members that it does not know; their names are those of `CompletionRequest` and
`ChatCompletionRequest` in `tensorrt_llm/serve/openai_protocol.py`, 1.2.1 and 1.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sidecar.adapters.base_model import BaseModel, read_base_model
from sidecar.adapters.canonical import NAMES
from sidecar.backends.api import HttpForm, Reply
from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.http_client import WireError
from sidecar.backends.kind import Ask, Asking, ModelKind, Native, Piece
from sidecar.backends.openai.asking import completion, remedy
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.events import record_of
from sidecar.backends.openai.paths import CHAT, COMPLETIONS, RESPONSES
from sidecar.backends.openai.server import OpenAiServer, Served
from sidecar.config.backends import Backend as Entry
from sidecar.config.restart import Restart
from sidecar.config.section import Section
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts

OWNER = "tensorrt_llm"
LORA = "lora_request"
PROMPT = tuple(range(3, 11))
_BOTH = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop",
        "stream", "stream_options", "temperature", "top_p", "user", "prompt_ignore_length", "best_of",
        "use_beam_search", "top_k", "top_p_min", "min_p", "repetition_penalty", "length_penalty", "early_stopping",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
        "spaces_between_special_tokens", "truncate_prompt_tokens", "echo", "add_special_tokens", "response_format",
    }
)  # fmt: skip
_KNOWN = {
    COMPLETIONS: _BOTH | {"prompt", "suffix", "return_context_logits", "detokenize"},
    CHAT: _BOTH
    | {
        "messages", "prompt_token_ids", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
        "reasoning_effort", "add_generation_prompt", "documents", "chat_template", "chat_template_kwargs",
        "mm_processor_kwargs",
    },
}  # fmt: skip
_LATER = frozenset({"thinking_token_budget", "priority", "cache_salt", "parallel_tool_calls"})
"""Members that newer servers know and older ones refuse themselves, by name."""
_REFUSED = {
    LORA: 'the sidecar names the adapter to the engine itself; name it in "model"',
    "disaggregated_params": "it says which server computes the prompt, which the sidecar does not do",
}


def why_not_client(path: str, members: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first member of a client's body that the server does not take, and why; ("", "") if it takes all."""
    for name in members:
        if name in _REFUSED:
            return name, f'"{name}" cannot be sent: {_REFUSED[name]}'
        if name not in _KNOWN[path] and name not in _LATER:
            otherwise = "leave it out, or ask for an adapter that vLLM serves"
            return name, f'trtllm-serve has no "{name}"; {remedy(name, sorted(_KNOWN[path] | _LATER), otherwise)}'
    return "", ""


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, **({"detokenize": False} if ask.text is None else {}))


class _Reader:
    """Reads events of a stream, or a whole answer: text, or token ids where the server did not turn them into text."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        record = record_of(reply.raw)
        choices = record.get("choices") or []
        if not choices:
            return Piece()
        ids = choices[0].get("token_ids") or ()
        if not self._is_text:
            return Piece("", ids, len(ids))
        used = (record.get("usage") or {}).get("completion_tokens")
        return Piece(choices[0].get("text") or "", (), 1 if used is None else used)


MODEL = ModelKind(
    name="trtllm",
    title="trtllm-serve",
    native=Native.OPENAI,
    asking=Asking(_write, lambda ask: "", _Reader),
    why_not_client=why_not_client,
    why_no_path={RESPONSES: "trtllm-serve answers there without the adapter"},
    salted=(CHAT,),
    long_by_default=True,
    reads_files=True,
    canonical_files=True,
    page_is_adapter=True,
    pages="the engine keeps {host} in memory (max_cpu_loras) and runs {device} at once (max_loras)",
)
EXPERIMENTAL = (
    "trtllm:// is experimental: it rests on trtllm-serve's source and has not been run against a real server yet"
)
_LORA_CONFIG = "trtllm-serve says it in lora_config, which this entry repeats: lora_config.{}"
_SIZES = "sizes are read from base_model.config"


class LoraConfig(Section):
    """The `lora_config` of the YAML file that trtllm-serve was started with; no route of the server tells it.

    `max_loras` bounds the adapters of one batch. Without `lora_target_modules` the engine takes all modules; where it
    infers them from `lora_dir`, name them here.
    """

    max_loras: int = Field(ge=1)
    max_cpu_loras: int | None = Field(None, ge=1)
    max_lora_rank: int = Field(64, ge=1)
    lora_target_modules: tuple[str, ...] = ()
    lora_dir: Annotated[tuple[str, ...], Field(max_length=1)] = ()
    lora_ckpt_source: Literal["hf"] = "hf"
    swap_gate_up_proj_lora_b_weight: Literal[True] = True

    @field_validator("lora_target_modules")
    @classmethod
    def _are_modules(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [module for module in modules if module not in NAMES]
        if unknown:
            raise ValueError(f"no adapter can be written for the module {unknown[0]!r}; there are {', '.join(NAMES)}")
        return modules

    @model_validator(mode="after")
    def _keeps_what_it_runs(self) -> Self:
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError("max_cpu_loras: the engine keeps no fewer adapters in memory than it runs (max_loras)")
        if self.lora_dir and not self.lora_target_modules:
            raise ValueError("lora_target_modules: the engine infers them from lora_dir; name those that it found")
        return self

    def modules_of(self, base: BaseModel) -> Mapping[str, tuple[int, int]]:
        """Return (in, out) of the modules to which the engine applies adapters."""
        names = set(self.lora_target_modules or NAMES)
        if names & {"attn_q", "attn_k", "attn_v"}:
            names |= {"attn_q", "attn_k", "attn_v"}  # the engine enables all three or none
        found = {name: dims for name, dims in base.modules.items() if name in names}
        if "attn_dense" in found:  # the engine's own table has it so, whatever o_proj takes (`createLoraModules`)
            hidden = base.modules["attn_q"][0]
            found["attn_dense"] = (hidden, hidden)
        return found


class TrtllmEntry(Entry):
    """A trtllm-serve with the PyTorch engine, by `trtllm://HOST:PORT`; `trtllms://HOST:PORT` by TLS.

    Adapters need `adapters_dir`, `lora_config` and `base_model.config`: an adapter that does not fit ends the engine,
    so each is checked against them first. `progress_timeout_s` is how long it may be silent with something in flight.

    The engine never frees an adapter's memory, so its versions are counted: at `host_versions_max` a metric and the log
    say so, and with `host_versions_on_limit: drain` the engine is drained and restarted by `restart`.
    """

    SCHEMES: ClassVar = {"trtllm": False, "trtllms": True}
    ELSEWHERE: ClassVar = {
        "triton://": {
            "model": "trtllm-serve serves one model, and is asked what it calls it",
            "text_model": "trtllm-serve takes text and tokens by one model",
            "models": "trtllm-serve serves one model, and is asked what it calls it",
            "metrics": "trtllm-serve's metrics are at its own url, under /metrics",
            "weights_transport": "trtllm-serve reads adapters' files itself, from adapters_dir",
            "engine.config": "it names a compiled engine's config.json; what trtllm-serve was started with goes into "
            "lora_config",
            "engine.modules": _LORA_CONFIG.format("lora_target_modules"),
            "engine.rank_multiple": "trtllm-serve pads ranks itself",
            "engine.heads": _SIZES,
            "engine.kv_heads": _SIZES,
            "engine.head_size": _SIZES,
            "engine.layers": _SIZES,
        },
        "triton:// and vllm://": {
            "engine.rank_max": _LORA_CONFIG.format("max_lora_rank"),
            "engine.device_pages": _LORA_CONFIG.format("max_loras"),
            "engine.host_pages": _LORA_CONFIG.format("max_cpu_loras"),
        },
        "vllm://": {
            "api_key_file": "trtllm-serve asks for no key",
            "old_versions": "it is about versions of vLLM",
        },
    }

    lora_config: LoraConfig | None = None
    progress_timeout_s: float = Field(60.0, gt=0)
    host_versions_max: int | None = Field(None, ge=16)
    host_versions_on_limit: Literal["warn", "drain"] = "warn"
    restart: Restart | None = None

    @property
    def restart_when_out(self) -> Restart | None:
        return self.restart if self.host_versions_on_limit == "drain" else None

    @model_validator(mode="after")
    def _can_restart(self) -> Self:
        if self.host_versions_on_limit == "drain":
            if self.host_versions_max is None:
                raise ValueError("host_versions_on_limit: drain needs host_versions_max: how many versions fit")
            if self.restart is None:
                raise ValueError(
                    "host_versions_on_limit: drain needs a way to restart the engine: restart: {command: [PROGRAM, "
                    "ARGUMENT]}, or {delete_pod: true} with discover.endpoint_slices"
                )
        is_a_pod = self.discover is not None and self.discover.endpoint_slices is not None
        if self.restart is not None and self.restart.delete_pod and not is_a_pod:
            raise ValueError(
                "restart.delete_pod: pods are known by name only where engines are found by discover.endpoint_slices; "
                "for others write restart: {command: [PROGRAM, ARGUMENT]}"
            )
        return self

    @model_validator(mode="after")
    def _can_check_adapters(self) -> Self:
        if self.adapters_dir is None:
            return self
        if self.lora_config is None:
            raise ValueError(
                "lora_config: with adapters_dir it is needed: repeat the lora_config of the YAML file that "
                "trtllm-serve was started with, at least max_loras"
            )
        if self.base_model is None or self.base_model.config is None:
            raise ValueError(
                "base_model.config: with adapters_dir it is needed: name the base model's folder, for an adapter of "
                "other sizes ends the engine"
            )
        return self

    def base(self) -> BaseModel | None:
        """Read the base model's config.json; None if none is named. Raises Misused."""
        named = None if self.base_model is None else self.base_model.config
        return None if named is None else read_base_model(Path(named).expanduser())


_TEXTS: tuple[tuple[tuple[str, ...], Fault], ...] = (
    (("Invalid low_rank",), Fault.DEADLY),
    (("not enabled for this model",), Fault.DEADLY),
    (("has to few values",), Fault.DEADLY),
    (("Expected layerId",), Fault.DEADLY),
    (("LoRA weights dtype",), Fault.DEADLY),
    (("more LoRA task ID than loRA slot size",), Fault.FULL),
    (("PEFT Cache is full",), Fault.LOST),
    (("no done tasks to evict",), Fault.LOST),
    (("copyTask ensure batch",), Fault.LOST),
    (("Event loop terminated",), Fault.LOST),
    (("Fatal error",), Fault.LOST),
    (("Hang detected",), Fault.LOST),
    (("LLM is unavailable",), Fault.LOST),
    (("lora_path", "does not exist"), Fault.MISS),
    (("Failed to load", "Errno 2"), Fault.MISS),
    (("not found in cache",), Fault.MISS),
)
"""Texts, by substring and in order: a failed step quotes its cause. What ends the engine comes first."""


class Trtllm(Dialect):
    """A carrying server. 1.2.1 reports itself healthy even if its engine is gone, and reading its measures empties
    them; it asks once a second whether a client is still there.
    """

    model = MODEL
    start = "trtllm-serve MODEL"
    options: ClassVar = {
        "device_pages": "max_loras",
        "host_pages": "max_cpu_loras",
        "rank_max": "max_lora_rank",
        "seats": "max_batch_size",
    }
    metrics_fix = (
        "the file of trtllm-serve's --extra_llm_api_options: enable_iter_perf_stats: true; and let nothing else read "
        "/metrics, for reading empties it (a scraper can take /prometheus/metrics)"
    )
    section = TrtllmEntry
    trusts_health = False
    carries = True
    lora_member = LORA
    notices_closed_s = 1.25
    reading_empties = True
    warning = EXPERIMENTAL
    proof_remedy = (
        "start trtllm-serve with a lora_config (--extra_llm_api_options FILE) that has the modules of this entry's, "
        "and where it sees the shared folder"
    )

    async def recognise(self, server: OpenAiServer) -> str:
        await self.served(server)
        return await self._version(server)

    async def _version(self, server: OpenAiServer) -> str:
        record = await server.record("/version")
        version = str(record["version"]) if isinstance(record, dict) and "version" in record else ""
        return f"trtllm-serve {version}".rstrip()

    async def identify(self, server: OpenAiServer, entry: TrtllmEntry) -> Found:
        """Refuses a part of a disaggregated server, too."""
        return Found(await self.served(server), await self._version(server), seats=await self.seats(server))

    async def served(self, server: OpenAiServer) -> Served:
        """Return the served model. Raises Misused if this is no trtllm-serve, or a disaggregated one's front."""
        reply = await server.get("/v1/models")
        try:
            entry = reply.json()["data"][0]
            if entry["owned_by"] == OWNER:
                return Served(str(entry["id"]))
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        if (await server.get("/cluster_info")).is_ok:
            raise server.unusable(
                "this is the front of a disaggregated trtllm-serve, which is not served: each of its servers would "
                "load adapters by itself; start one trtllm-serve that computes prompts and answers"
            )
        raise server.unusable(
            f"/v1/models answers {reply.status} and not as trtllm-serve does; is another server there? "
            f"({reply.text[:120]})"
        )

    async def seats(self, server: OpenAiServer) -> int | None:
        """Return max_batch_size, which newer servers tell; None otherwise."""
        record = await server.record("/server_info")
        if not isinstance(record, dict):
            return None
        if record.get("disaggregated_params"):
            raise server.unusable(
                "this server computes prompts or answers only (disaggregated), which is not served; start one "
                "trtllm-serve that does both"
            )
        return _whole(record.get("max_batch_size"))

    async def examine(
        self,
        server: OpenAiServer,
        found: Found,
        entry: TrtllmEntry,
        declared: EngineFacts,
        must_answer: bool,
        patience_s: float,
    ) -> Found:
        """Let the engine answer a token in any case: only that proves that it lives."""
        status, text = await server.ask(self.one_token(found.served.base), patience_s)
        if status != HTTPStatus.OK:
            raise server.unusable(f"the engine answers no token: {text}")
        return replace(found, measures=await self.measures(server))

    async def measures(self, server: OpenAiServer) -> Measures:
        """Return the newest record of /metrics; nothing if there was none since it was read last."""
        try:
            records = await server.record("/metrics")
        except WireError:
            return Measures()
        if not isinstance(records, list) or not records or not isinstance(records[-1], dict):
            return Measures()
        newest = records[-1]
        cache = newest.get("kvCacheStats") or {}
        block = _whole(cache.get("tokensPerBlock")) or 0
        total, used = _whole(cache.get("maxNumBlocks")), _whole(cache.get("usedNumBlocks"))
        return Measures(
            steps=_whole(newest.get("iter")),
            kv_tokens=total * block if total and block else None,
            kv_used=used * block if used is not None and block else None,
            inside=_whole(newest.get("numActiveRequests")),
        )

    def one_token(self, base: str) -> dict[str, Any]:
        return {
            "model": "base",
            "prompt": list(PROMPT),
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "detokenize": False,
        }

    def fault_of(self, status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
        """A full cache ends the engine, so it is LOST. DEADLY means that the adapter has ended the engine."""
        for parts, fault in _TEXTS:
            if all(part in text for part in parts) and not any(wrote(part) for part in parts):
                return fault
        return Fault.LOST if status == HTTPStatus.SERVICE_UNAVAILABLE else Fault.REJECTED

    def flag(self, key: str) -> str:
        return f"--{self.options[key]}"

    def setting(self, key: str, value: Any) -> str:
        if key == "seats":
            return f"config.yaml: engine: {{seats: {value}}}"
        return f"lora_config: {{{self.options[key]}: {value}}}   (in trtllm-serve's file and in config.yaml)"

    def declare(self, entry: TrtllmEntry, declared: EngineFacts) -> EngineFacts:
        facts = replace(declared, unloads="nothing")
        lora, base = entry.lora_config, entry.base()
        if lora is None or base is None:
            return facts
        return replace(
            facts,
            rank_max=lora.max_lora_rank,
            modules=lora.modules_of(base),
            device_pages=lora.max_loras,
            host_pages=lora.max_cpu_loras,
        )

    def notes(self, entry: TrtllmEntry, declared: EngineFacts) -> Iterator[str]:
        yield EXPERIMENTAL
        if entry.adapters_dir is None:
            yield (
                "no folder is shared with the engine, so it serves its base model only; backends[].adapters_dir: PATH"
                "   (or {ours: PATH here, engine: PATH in the engine's container})"
            )
            return
        assert entry.lora_config is not None
        lora: Any = entry.lora_config
        if lora.max_cpu_loras is None or lora.max_cpu_loras < 2 * lora.max_loras:
            said = "is not set" if lora.max_cpu_loras is None else f"is {lora.max_cpu_loras}"
            yield (
                f"max_cpu_loras {said}: an engine whose host cache is full ends, so start it with at least "
                f"{2 * lora.max_loras} (twice max_loras) and say so in backends[].lora_config.max_cpu_loras"
            )
        if declared.seats is None:
            yield (
                "max_batch_size is not declared, and only newer servers publish it; backends[].engine: {seats: the "
                "engine's max_batch_size}"
            )
        if entry.host_versions_max is None:
            yield (
                "the engine keeps each adapter version in memory until it is restarted, and no limit is set; "
                "backends[].host_versions_max: how many fit in its host's memory"
            )


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


DIALECT = Trtllm()
