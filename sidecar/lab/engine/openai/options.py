"""The options of an emulated vLLM: those of the emulated Triton that apply, and vLLM's own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from sidecar.lab.engine.http.options import HttpOptions
from sidecar.lab.engine.kserve.options import FAULTS, VLLM_ONLY, cli, spec_of
from sidecar.lab.engine.spec import VLLM, EngineSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank."""
VERSIONS = ("0.32.0", "0.33.0")
"""The versions with which the behaviour was compared; another one behaves as the nearest of them."""


GENERATE, POOLING = "generate", "pooling"


@dataclass(frozen=True, kw_only=True)
class VllmOptions(HttpOptions):
    """All options of one emulated vLLM. Those of `Options` about Triton or the bytes of caches have no effect.

    The help texts below define them; beyond those:

    * `seats` is vLLM's --max-num-seqs, `max_seq_tokens` --max-model-len, `max_tokens_per_step`
      --max-num-batched-tokens.
    * Without `runtime_lora` there are no routes to load and unload.
    * The real vLLM joins more than `stream_interval` tokens in a chunk under load.
    * With `mixing_breaks_base` base requests are wrong in a step with adapter requests, as in vLLM's CPU build.

    Raises ValueError if options contradict each other.
    """

    protocol: str = VLLM
    scheduler: str = VLLM
    max_lora_rank: int = 16
    tokens_per_block: int = 128
    max_loras: int = 1
    vllm_version: str = field(
        default=VERSIONS[0],
        metadata=cli(VLLM_ONLY, f"Whose words and traps it has: {' or '.join(VERSIONS)}."),
    )
    rust_frontend: bool = field(
        default=False,
        metadata=cli(VLLM_ONLY, "Be the Rust front end.", "--rust-frontend"),
    )
    runner: str = field(
        default=GENERATE,
        metadata=cli(
            VLLM_ONLY, f"{GENERATE} or {POOLING}: answer with tokens, or with embeddings, scores and classes."
        ),
    )
    allowed_prefix: tuple[str, ...] = field(
        default=(),
        metadata=cli(
            VLLM_ONLY,
            "A folder from which adapters may be loaded; the Rust front end loads from none other.",
        ),
    )
    enable_lora: bool = field(default=True, metadata=cli(VLLM_ONLY, "Have LoRA at all."))
    dev_mode: bool = field(
        default=False, metadata=cli(VLLM_ONLY, "Tell what it was started with, at /server_info.", "--dev-mode")
    )
    runtime_lora: bool = field(default=True, metadata=cli(VLLM_ONLY, "Take the calls that load and unload adapters."))
    stream_interval: int = field(
        default=1, metadata=cli(VLLM_ONLY, "Tokens in a chunk of a stream, the first chunk aside.")
    )
    api_key: str | None = field(default=None, metadata=cli(VLLM_ONLY, "What clients must bring as bearer token."))
    multimodal: bool = field(
        default=False,
        metadata=cli(
            VLLM_ONLY,
            "Serve the language model of a multimodal one: its modules' names have a prefix, which text-only adapters "
            "lack; only 0.33 finds theirs.",
            "--multimodal",
        ),
    )
    fail_load: tuple[str, ...] = field(default=(), metadata=cli(FAULTS, "Fail vLLM's load calls of this adapter."))
    mixing_breaks_base: bool = field(
        default=False,
        metadata=cli(
            FAULTS, "Answer base requests wrongly in vLLM batches that have adapters.", "--mixing-breaks-base"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.vllm_version):
            raise ValueError(f"vllm_version {self.vllm_version}: it is {' or '.join(VERSIONS)}")
        if self.runner not in (GENERATE, POOLING):
            raise ValueError(f"runner {self.runner}: it is {GENERATE} or {POOLING}")
        if self.max_lora_rank not in RANKS:
            raise ValueError(f"max_lora_rank {self.max_lora_rank}: vLLM takes {', '.join(map(str, RANKS))}")

    @property
    def is_older(self) -> bool:
        """True if it behaves as vLLM 0.32."""
        return tuple(map(int, self.vllm_version.split("."))) < (0, 33)

    @property
    def cpu_loras(self) -> int:
        """How many adapters the CPU cache holds."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras


def vllm_spec_of(options: VllmOptions) -> EngineSpec:
    """Return the engine's spec. Raises ValueError if its numbers contradict each other."""
    return spec_of(
        replace(
            options,
            lora_device_pages=options.max_loras,
            lora_host_pages=options.cpu_loras,
            max_input_tokens=options.max_seq_tokens,
        )
    )
