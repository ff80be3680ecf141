"""The options of an emulated engine: how it is built, how its server is configured, which faults it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.lab.engine.shape import ALL_LINEAR, SHAPES, shape_of
from sidecar.lab.engine.spec import GUARANTEED_NO_EVICT, SCHEDULERS, VLLM, EngineSpec

WEIGHTS_DATATYPES = {"fp16": "FP16", "bf16": "BF16"}
DATATYPE_OF_DTYPE = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
COMPUTES = ("llama", "none")
TRITON, LLMAPI = "triton", "llmapi"
TRTLLM, SGLANG = "trtllm", "sglang"
PROTOCOLS = (TRITON, LLMAPI, VLLM, SGLANG, TRTLLM)
SERVER, MODELS, ENGINE, LORA, FAULTS = "Server", "Triton's models", "Engine", "LoRA caches", "Faults"
TRITON_ONLY, HTTP_ONLY, VLLM_ONLY, TRTLLM_ONLY = "Triton", "Engines with an OpenAI API", "vLLM", "trtllm-serve"
PANELS = SERVER, MODELS, ENGINE, LORA, TRITON_ONLY, HTTP_ONLY, VLLM_ONLY, TRTLLM_ONLY, FAULTS
"""The panels of `sidecar emulate --help`."""


def cli(panel: str, text: str, *flags: str, **default: Any) -> dict[str, Any]:
    """Return the metadata of a field that is an option of `sidecar emulate`, with a help text in a panel.

    `default` is the default there if it differs from the field's; None leaves the choice to the kind of engine.
    """
    return {"panel": panel, "help": text, "flags": flags, **default}


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of one emulated server; the defaults serve the tiny model in real time.

    The help texts below define them; beyond those:

    * Ports of 0 are chosen by the system; `metrics_port` None serves no metrics.
    * `compute` None runs the executor for the tiny shape and one of a file, and makes dummy tokens for larger ones.
    * `time_scale` multiplies the durations of `cost_table`.
    * `lora_weights` is the tensor's type in the model's config.pbtxt and may contradict `dtype`, as deployments do.
    * `exclude_input_in_output` is the default of the input of that name: as in the executor's OutputConfig, a whole
      answer begins with the prompt unless it is excluded, and a streamed one never does.
    * `seats` is the engine's batch size, `triton_max_batch_size` the model's.
    * With `separate_final` the last data response does not carry the final flag, as with Python models, and the empty
      final response goes only to clients that ask for it.
    * All `instances` stand behind one address.
    * `ignore_lora` accepts adapters with any type of weights.

    Raises ValueError if options contradict each other.
    """

    host: str = field(default="127.0.0.1", metadata=cli(SERVER, "Address to listen on."))
    grpc_port: int = field(
        default=0, metadata=cli(SERVER, "Port of the gRPC service; 0 takes a free one.", default=8001)
    )
    metrics_port: int | None = field(
        default=0, metadata=cli(SERVER, "Port of the metrics; 0 takes a free one.", default=8002)
    )
    decoupled: bool = field(default=True, metadata=cli(MODELS, "Serve decoupled models (streams only) or not."))
    separate_final: bool = field(default=False, metadata=cli(MODELS, "Mark ends with an empty response of its own."))
    exclude_input_in_output: bool = False
    triton_max_batch_size: int = field(default=64, metadata=cli(SERVER, "max_batch_size of the models."))
    instances: int = field(
        default=1, metadata=cli(TRITON_ONLY, "Model instances, each with an engine and caches of its own.")
    )
    text_model: bool = field(default=True, metadata=cli(MODELS, "Serve the text model (ensemble) as well."))
    protocol: str = field(
        default=TRITON,
        metadata=cli(
            SERVER,
            "triton: the core model; llmapi: the one that loads from paths; vllm, sglang, trtllm: an OpenAI API.",
        ),
    )
    write_engine_config: Path | None = field(
        default=None, metadata=cli(TRITON_ONLY, "Write the engine's config.json there, for backends to read.")
    )
    write_config: Path | None = field(
        default=None,
        metadata=cli(TRITON_ONLY, "Write a sidecar's configuration for this engine there, with its sizes."),
    )
    served_log: Path | None = field(
        default=None, metadata=cli(SERVER, "Append a JSON line for each request that ends.")
    )
    tls_certificate: Path | None = field(
        default=None, metadata=cli(SERVER, "PEM file; with a key, the service speaks TLS.")
    )
    tls_key: Path | None = field(default=None, metadata=cli(SERVER, "PEM file."))
    tls_client_ca: Path | None = field(
        default=None, metadata=cli(SERVER, "PEM file; clients must show a certificate of its.")
    )

    shape: str = field(default="tiny", metadata=cli(ENGINE, f"Model: {', '.join(SHAPES)}, or a path of a config.json."))
    compute: str | None = field(
        default=None,
        metadata=cli(ENGINE, "llama computes tokens, none makes dummy ones; default: llama for small models."),
    )
    seed: int = field(default=0, metadata=cli(ENGINE, "Seed of the base model."))
    dtype: str = field(default="float16", metadata=cli(ENGINE, "Engine dtype: float16, bfloat16, float32."))
    tp: int = field(default=1, metadata=cli(ENGINE, "Tensor-parallel ranks, for page sizes."))
    seats: int = field(default=64, metadata=cli(ENGINE, "Requests that run at a time.", "--seats", "--max-num-seqs"))
    max_input_tokens: int = field(default=4096, metadata=cli(ENGINE, "Longest prompt."))
    max_seq_tokens: int = field(default=8192, metadata=cli(ENGINE, "Longest prompt and answer together."))
    max_tokens_per_step: int = field(
        default=8192,
        metadata=cli(ENGINE, "Tokens that one step computes."),
    )
    kv_blocks: int = field(default=4096, metadata=cli(ENGINE, "Blocks of the KV cache."))
    tokens_per_block: int = field(
        default=64, metadata=cli(ENGINE, "Tokens in a KV block; default: 64, vllm: 128, trtllm: 32.", default=None)
    )
    scheduler: str = field(
        default=GUARANTEED_NO_EVICT,
        metadata=cli(ENGINE, f"Triton's capacity scheduler: {', '.join(SCHEDULERS)}; the others have their own."),
    )
    time_scale: float = field(
        default=1.0, metadata=cli(ENGINE, "1: as slow as the modelled GPU; 0: as fast as possible.")
    )
    cost_table: Path | None = field(
        default=None,
        metadata=cli(ENGINE, "Step times to model; default: an A100 with an 8B model.", "--cost", "--cost-table"),
    )

    lora_modules: tuple[str, ...] = field(
        default=ALL_LINEAR,
        metadata=cli(
            LORA, "LoRA modules of the engine, by commas.", default=",".join(ALL_LINEAR), shown="all linear layers"
        ),
    )
    lora_weights: str | None = field(
        default=None, metadata=cli(LORA, "Type of lora_weights in ModelConfig: fp16, bf16; default: dtype.")
    )
    max_lora_rank: int = field(
        default=64, metadata=cli(LORA, "Rank limit of the engine; default: 64, vllm: 16.", default=None)
    )
    lora_optimal_rank: int = field(default=8, metadata=cli(LORA, "lora_cache_optimal_adapter_size: sizes a page."))
    lora_max_rank_cached: int = field(default=64, metadata=cli(LORA, "lora_cache_max_adapter_size."))
    lora_host_bytes: int = field(default=1 << 30, metadata=cli(LORA, "lora_cache_host_memory_bytes."))
    lora_device_bytes: int = field(default=1 << 30, metadata=cli(LORA, "Bytes of the device cache."))
    load_ms: float = field(
        default=0.0, metadata=cli(LORA, "Milliseconds that each load of an adapter takes in addition.")
    )
    lora_gpu_memory_fraction: float = 0.05
    lora_host_pages: int | None = field(default=None, metadata=cli(LORA, "Pages of the host cache, instead of bytes."))
    lora_device_pages: int | None = field(
        default=None, metadata=cli(LORA, "Pages of the device cache, instead of bytes.")
    )

    max_queue: int = field(default=0, metadata=cli(TRITON_ONLY, "Limit of the executor's queue; 0: none."))
    crash_on_load: tuple[str, ...] = field(
        default=(), metadata=cli(FAULTS, "Crash when this adapter (parameter lora_name, or task id) is loaded.")
    )
    crash_on_weights: tuple[str, ...] = field(
        default=(), metadata=cli(TRITON_ONLY, "Crash when weights with this SHA-256 prefix are loaded.")
    )
    fail_step_on_load: tuple[str, ...] = field(
        default=(), metadata=cli(FAULTS, "Fail the step after this adapter is loaded, once.")
    )
    full_errors: int = field(default=0, metadata=cli(TRITON_ONLY, "Answer this many loads with a full cache."))
    claim_errors: int = field(default=0, metadata=cli(TRITON_ONLY, "Then this many with a failed page claim."))
    freeze_after: int | None = field(default=None, metadata=cli(FAULTS, "Stop iterating after this many steps."))
    slow_factor: float = field(default=1.0, metadata=cli(FAULTS, "Multiply the time of every step."))
    ignore_lora: bool = field(
        default=False, metadata=cli(TRITON_ONLY, "Take every adapter and answer as the base model.", "--ignore-lora")
    )

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and a key")
        if self.instances < 1:
            raise ValueError(f"a model has 1 instance or more, not {self.instances}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}; there are {', '.join(PROTOCOLS)}")
        shape_of(self.shape)
        if self.compute is not None and self.compute not in COMPUTES:
            raise ValueError(f"unknown compute {self.compute!r}; there are {', '.join(COMPUTES)}")
        if self.lora_weights is not None and self.lora_weights not in WEIGHTS_DATATYPES:
            raise ValueError(
                f"unknown type of lora_weights {self.lora_weights!r}; there are {', '.join(WEIGHTS_DATATYPES)}"
            )

    @property
    def computes(self) -> bool:
        """True if tokens come from the real executor."""
        is_small = self.shape == "tiny" or self.shape not in SHAPES
        return self.compute == "llama" or (self.compute is None and is_small)

    @property
    def weights_datatype(self) -> str:
        """Triton's name of the type of `lora_weights`."""
        if self.lora_weights is None:
            return DATATYPE_OF_DTYPE[self.dtype]
        return WEIGHTS_DATATYPES[self.lora_weights]


def spec_of(options: Options) -> EngineSpec:
    """Return the engine's spec. Raises ValueError if its numbers contradict each other."""
    return EngineSpec(
        shape=shape_of(options.shape),
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
