"""The options of an emulated trtllm-serve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.lab.engine.http.options import HttpOptions
from sidecar.lab.engine.kserve.options import FAULTS, TRTLLM, TRTLLM_ONLY, cli, spec_of
from sidecar.lab.engine.spec import TRTLLM_PYTORCH, EngineSpec, module_layer_pages

RELEASED, MAIN = "1.2", "main"
ERAS = (RELEASED, MAIN)
VERSIONS = {RELEASED: "1.2.1", MAIN: "1.3.0rc22"}
SLOTS = 8
"""Adapter slots of a CUDA graph without max_loras."""
_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, kw_only=True)
class TrtllmOptions(HttpOptions):
    """All options of one emulated trtllm-serve. Those of `Options` about Triton have no effect.

    The help texts below define them; beyond those:

    * `seats` is max_batch_size, `max_seq_tokens` max_seq_len, `max_tokens_per_step` max_num_tokens, `lora_modules`
      lora_target_modules: without any, LoRA is off. With one of q, k and v the others are targets too.
    * `max_loras` and `max_cpu_loras` size the caches by adapters of the largest rank; without them, bytes do.
    * `load_ms` passes at each read of an adapter whatever the time scale: in the submit thread, and in the loop, where
      everything waits for it. In era 1.2 the loop reads only what has left the caches since the request was submitted.
    * `step_errors_max` failed steps end the loop in era main. The real budget recovers with time; this one does not.
    * `dead_text` answers requests that come after the loop's end; by default they hang as those before do.

    Raises ValueError if options contradict each other.
    """

    protocol: str = TRTLLM
    scheduler: str = TRTLLM_PYTORCH
    tokens_per_block: int = 32
    era: str = field(default=MAIN, metadata=cli(TRTLLM_ONLY, "1.2: release 1.2.1; main: 1.3.0rc22 and later.", "--era"))
    iteration_stats: bool = field(
        default=False, metadata=cli(TRTLLM_ONLY, "enable_iter_perf_stats: /metrics has something to drain.")
    )
    perf_metrics: bool = field(
        default=False, metadata=cli(TRTLLM_ONLY, "return_perf_metrics: serve /prometheus/metrics.")
    )
    cuda_graphs: bool = field(
        default=True, metadata=cli(TRTLLM_ONLY, "Decode with CUDA graphs, whose adapter slots are limited.")
    )
    native_fp8: bool = field(
        default=False, metadata=cli(TRTLLM_ONLY, "Keep fp8 adapters in fp8, as on SM90.", "--native-fp8")
    )
    late_path_check: bool = field(
        default=False,
        metadata=cli(TRTLLM_ONLY, "Check paths at the load, as main does since TL#17138.", "--late-path-check"),
    )
    step_errors_max: int = field(default=10, metadata=cli(FAULTS, "Failed steps that end trtllm-serve's loop."))
    dead_text: str | None = field(
        default=None, metadata=cli(FAULTS, "Refuse requests with this text once trtllm-serve's loop has ended.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.era not in ERAS:
            raise ValueError(f"unknown era {self.era!r} of trtllm-serve; there are {', '.join(ERAS)}")
        if self.load_ms < 0:
            raise ValueError(f"load_ms {self.load_ms}: expected 0 or more milliseconds")
        for name in ("max_loras", "max_cpu_loras"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name} {given}: expected 1 adapter or more")

    @property
    def is_main(self) -> bool:
        """True for the era of 1.3.0rc22 and later."""
        return self.era == MAIN

    @property
    def model_name(self) -> str:
        """The base model's name."""
        return self.names[0]

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that adapters may change; q, k and v come together."""
        modules = self.lora_modules
        if not any(name in modules for name in _QKV):
            return modules
        return (*modules, *(name for name in _QKV if name not in modules))


def trtllm_spec_of(options: TrtllmOptions) -> EngineSpec:
    """Return the engine's spec. Raises ValueError if its numbers contradict each other."""
    spec = spec_of(replace(options, lora_modules=options.targets, max_input_tokens=options.max_seq_tokens))
    if not spec.lora_modules:
        return spec
    sizes = {"lora_device_pages": options.max_loras, "lora_host_pages": options.max_cpu_loras}
    given: dict[str, Any] = {
        name: module_layer_pages(spec, count) for name, count in sizes.items() if count is not None
    }
    return replace(
        spec,
        lora_slots=(options.max_loras or SLOTS) if options.cuda_graphs else None,
        lora_load_ns=int(options.load_ms * 1e6),
        step_errors_max=options.step_errors_max if options.is_main else None,
        **given,
    )
