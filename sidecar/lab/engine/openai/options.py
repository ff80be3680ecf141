"""How an emulated vLLM is started: the options that it shares with the other face, and vLLM's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sidecar.lab.engine.kserve.options import Options, spec_of
from sidecar.lab.engine.spec import VLLM, EngineSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
_OTHERS = (
    "instances",
    "write_engine_config",
    "max_queue",
    "crash_on_weights",
    "full_errors",
    "claim_errors",
    "ignore_lora",
)
"""Options that an emulated vLLM has no use for, and that would be missed."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions(Options):
    """All options of one emulated vLLM; of `Options` those that speak of Triton or of cache bytes change nothing.

    `seats` is --max-num-seqs, `max_seq_tokens` --max-model-len, `max_tokens_per_step` --max-num-batched-tokens.
    `served_model_name` are the names of the base model, the first one that answers carry; without any it is the
    shape's. `max_cpu_loras` None is as many as `max_loras`. `runtime_lora` is VLLM_ALLOW_RUNTIME_LORA_UPDATING: without
    it there are no routes to load and unload. `stream_interval` tokens come in one chunk of a stream, except for the
    first; the real one joins more when it is pressed. `api_key` is what clients must bring. `fail_load` names adapters
    whose load calls fail. With `mixing_breaks_base` requests of the base model come out wrong in a step that has
    requests of adapters too, as in vLLM's build for CPUs. Raises ValueError where options contradict each other.
    """

    protocol: str = VLLM
    scheduler: str = VLLM
    http_port: int = 0
    served_model_name: tuple[str, ...] = ()
    max_lora_rank: int = 16
    max_loras: int = 1
    max_cpu_loras: int | None = None
    tokens_per_block: int = 128
    runtime_lora: bool = True
    stream_interval: int = 1
    api_key: str | None = None
    fail_load: tuple[str, ...] = ()
    mixing_breaks_base: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lora_rank not in RANKS:
            raise ValueError(f"max_lora_rank {self.max_lora_rank}: vLLM takes {', '.join(map(str, RANKS))}")
        defaults = {field.name: field.default for field in fields(Options)}
        for name in _OTHERS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is an option of the engine behind Triton; an emulated vLLM has none of it")

    @property
    def names(self) -> tuple[str, ...]:
        """The base model's names."""
        return self.served_model_name or (self.shape,)

    @property
    def cpu_loras(self) -> int:
        """How many adapters the CPU cache holds."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras


def vllm_spec_of(options: VllmOptions) -> EngineSpec:
    """Return the engine's numbers; ValueError where they contradict each other."""
    return spec_of(
        replace(
            options,
            lora_device_pages=options.max_loras,
            lora_host_pages=options.cpu_loras,
            max_input_tokens=options.max_seq_tokens,
        )
    )
