"""How an emulated engine is built, how its server is configured, and which faults it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.lab.engine.shape import ALL_LINEAR, SHAPES
from sidecar.lab.engine.spec import GUARANTEED_NO_EVICT, VLLM, EngineSpec

WEIGHTS_DATATYPES = {"fp16": "FP16", "bf16": "BF16"}
DATATYPE_OF_DTYPE = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
COMPUTES = ("llama", "none")
TRITON, LLMAPI = "triton", "llmapi"
PROTOCOLS = (TRITON, LLMAPI, VLLM)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one emulated server; the defaults serve the tiny model in real time.

    Ports of 0 are chosen by the system; `metrics_port` None serves no metrics. `compute` None runs the
    executor for the tiny shape and makes dummy tokens for larger ones. `time_scale` multiplies the modelled
    durations of `cost_table` (None: an A100 with an 8B model; scale 0: as fast as the machine can).
    `lora_weights` is the tensor's type in the model's config.pbtxt ("fp16" or "bf16"; None: the engine's
    dtype); it may contradict `dtype`, as deployments do. `exclude_input_in_output` is the default of the
    input of that name: as in the executor's OutputConfig, a whole answer begins with the prompt unless it is
    excluded, and a streamed one never does. `seats` is the engine's batch, `triton_max_batch_size` the
    model's. `separate_final` answers as Python models do: the last data
    response does not carry the final flag, and the empty final one comes only to clients that ask for it.
    `instances` model instances stand behind the one address, each with an engine of its own; `text_model` False
    leaves out the ensemble. `ignore_lora` takes every adapter, whatever the type of its weights, and computes as the
    base model. With `protocol` "llmapi" the server has the LLM-API model instead, which loads adapters from paths.
    Raises ValueError where options contradict each other.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 0
    metrics_port: int | None = 0
    shape: str = "tiny"
    compute: str | None = None
    seed: int = 0
    dtype: str = "float16"
    lora_weights: str | None = None
    decoupled: bool = True
    separate_final: bool = False
    exclude_input_in_output: bool = False
    triton_max_batch_size: int = 64
    instances: int = 1
    text_model: bool = True
    protocol: str = TRITON
    lora_modules: tuple[str, ...] = ALL_LINEAR
    max_lora_rank: int = 64
    seats: int = 64
    max_input_tokens: int = 4096
    max_seq_tokens: int = 8192
    max_tokens_per_step: int = 8192
    kv_blocks: int = 4096
    tokens_per_block: int = 64
    scheduler: str = GUARANTEED_NO_EVICT
    tp: int = 1
    lora_optimal_rank: int = 8
    lora_max_rank_cached: int = 64
    lora_host_bytes: int = 1 << 30
    lora_device_bytes: int = 1 << 30
    lora_gpu_memory_fraction: float = 0.05
    lora_host_pages: int | None = None
    lora_device_pages: int | None = None
    time_scale: float = 1.0
    cost_table: Path | None = None
    write_engine_config: Path | None = None
    served_log: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    max_queue: int = 0
    crash_on_load: tuple[str, ...] = ()
    crash_on_weights: tuple[str, ...] = ()
    fail_step_on_load: tuple[str, ...] = ()
    full_errors: int = 0
    claim_errors: int = 0
    freeze_after: int | None = None
    slow_factor: float = 1.0
    ignore_lora: bool = False

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and a key")
        if self.instances < 1:
            raise ValueError(f"a model has 1 instance or more, not {self.instances}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}; there are {', '.join(PROTOCOLS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; there are {', '.join(SHAPES)}")
        if self.compute is not None and self.compute not in COMPUTES:
            raise ValueError(f"unknown compute {self.compute!r}; there are {', '.join(COMPUTES)}")
        if self.lora_weights is not None and self.lora_weights not in WEIGHTS_DATATYPES:
            raise ValueError(
                f"unknown type of lora_weights {self.lora_weights!r}; there are {', '.join(WEIGHTS_DATATYPES)}"
            )

    @property
    def computes(self) -> bool:
        """Whether tokens come from the real executor."""
        return self.compute == "llama" or (self.compute is None and self.shape == "tiny")

    @property
    def weights_datatype(self) -> str:
        """Triton's name for the type of `lora_weights`."""
        if self.lora_weights is None:
            return DATATYPE_OF_DTYPE[self.dtype]
        return WEIGHTS_DATATYPES[self.lora_weights]


def spec_of(options: Options) -> EngineSpec:
    """Return the engine's numbers; ValueError where they contradict each other."""
    return EngineSpec(
        shape=SHAPES[options.shape],
        dtype=options.dtype,
        tp=options.tp,
        lora_modules=options.lora_modules,
        max_lora_rank=options.max_lora_rank,
        max_batch_size=options.seats,
        max_input_tokens=options.max_input_tokens,
        max_seq_tokens=options.max_seq_tokens,
        max_tokens_per_step=options.max_tokens_per_step,
        kv_blocks=options.kv_blocks,
        tokens_per_block=options.tokens_per_block,
        scheduler=options.scheduler,
        lora_optimal_rank=options.lora_optimal_rank,
        lora_max_rank_cached=options.lora_max_rank_cached,
        lora_host_bytes=options.lora_host_bytes,
        lora_device_bytes=options.lora_device_bytes,
        lora_host_pages=options.lora_host_pages,
        lora_device_pages=options.lora_device_pages,
        max_queue=options.max_queue,
    )
