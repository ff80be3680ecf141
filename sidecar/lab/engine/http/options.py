"""The options that emulated engines with an HTTP API share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from sidecar.lab.engine.kserve.options import HTTP_ONLY, SERVER, Options, cli

_TRITONS = (
    "instances",
    "write_engine_config",
    "write_config",
    "max_queue",
    "crash_on_weights",
    "full_errors",
    "claim_errors",
    "ignore_lora",
)
"""Options that these engines refuse: a user would miss their effect."""


@dataclass(frozen=True, kw_only=True)
class HttpOptions(Options):
    """All options of one emulated engine with an HTTP API. Those of `Options` about Triton have no effect.

    Answers of vLLM carry the first `served_model_name`; trtllm-serve has one name.

    Raises ValueError if options contradict each other.
    """

    http_port: int = field(default=0, metadata=cli(SERVER, "Port of the HTTP API; 0 takes a free one.", default=8000))
    served_model_name: tuple[str, ...] = field(
        default=(), metadata=cli(HTTP_ONLY, "Name of the base model, may be given again; default: the shape.")
    )
    max_loras: int | None = field(
        default=None,
        metadata=cli(HTTP_ONLY, "Adapters in one batch, SGLang's max_loras_per_batch; default: vllm: 1, others: 8."),
    )
    max_cpu_loras: int | None = field(
        default=None,
        metadata=cli(
            HTTP_ONLY,
            "Adapters in the CPU cache, SGLang's max_loaded_loras; default: vllm: max_loras, trtllm: by bytes.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {each.name: each.default for each in fields(Options)}
        for name in _TRITONS:
            if getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is an option of the engine behind Triton; {self.protocol} has none of it")

    @property
    def names(self) -> tuple[str, ...]:
        """The base model's names."""
        return self.served_model_name or (self.shape,)
