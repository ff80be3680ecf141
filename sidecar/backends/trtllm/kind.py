"""The backend kind `trtllm`: its configuration, how it is connected, and what it can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sidecar.adapters.base_model import BaseModel, read_base_model
from sidecar.adapters.canonical import NAMES
from sidecar.backends.api import Backend
from sidecar.backends.kind import Checks, Kind, ModelKind, Native, Wiring, with_kind
from sidecar.backends.openai.asking import CHAT
from sidecar.backends.trtllm.asking import ASKING, why_not_client
from sidecar.config.backends import Backend as Entry
from sidecar.config.restart import Restart
from sidecar.config.section import Section
from sidecar.core.facts import EngineFacts

MODEL = ModelKind(
    name="trtllm",
    title="trtllm-serve",
    native=Native.OPENAI,
    asking=ASKING,
    why_not_client=why_not_client,
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


def _declare(entry: TrtllmEntry, declared: EngineFacts, all_of_kind: Sequence[TrtllmEntry]) -> EngineFacts:
    facts = replace(with_kind(declared, MODEL), base_only=entry.adapters_dir is None, unloads="nothing")
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


def _connect(entry: TrtllmEntry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    from sidecar.backends.trtllm.backend import TrtllmBackend

    return TrtllmBackend(entry, declared, wiring.owner), declared


def _checks() -> Checks:
    from sidecar.backends.trtllm.checks import CHECKS

    return CHECKS


def _notes(entry: TrtllmEntry, declared: EngineFacts) -> Iterator[str]:
    yield EXPERIMENTAL
    if entry.adapters_dir is None:
        yield (
            "no folder is shared with the engine, so it serves its base model only; backends[].adapters_dir: PATH   "
            "(or {ours: PATH here, engine: PATH in the engine's container})"
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


TRTLLM = Kind("trtllm", TrtllmEntry, (MODEL,), _connect, _declare, _checks, _notes)
