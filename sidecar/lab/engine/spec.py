"""How an emulated engine was built and how its runtime is configured, and TensorRT-LLM's `config.json` for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sidecar.lab.engine import pages
from sidecar.lab.engine.pages import DTYPE_BYTES, Geometry
from sidecar.lab.engine.shape import HF_MODULES, SHAPES, ModelShape, ModuleDims, module_dims

GUARANTEED_NO_EVICT = "guaranteed_no_evict"
MAX_UTILIZATION = "max_utilization"
STATIC_BATCH = "static_batch"
MAX_REQUESTS = "max_requests"
STRICT_FIFO = "strict_fifo"
VLLM = "vllm"
TRTLLM_PYTORCH = "trtllm_pytorch"
SCHEDULERS = (GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH, MAX_REQUESTS, STRICT_FIFO)
"""TensorRT-LLM's capacity schedulers, and a strict one to compare with."""
_OTHERS = (VLLM, TRTLLM_PYTORCH)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine as pure numbers.

    `max_batch_size` is the number of seats. `lora_host_bytes` and `lora_device_bytes` size the two adapter caches
    unless `lora_host_pages` or `lora_device_pages` give the pages directly. A `max_queue` of 0 is unlimited. Without
    `lora_modules` the engine knows no adapters and ignores task ids. The scheduler `max_requests` is for models without
    a KV cache: it considers seats only.

    The scheduler `vllm` makes it a vLLM engine. There an adapter takes one page whatever its rank: `lora_device_pages`
    is `max_loras` and `lora_host_pages` is `max_cpu_loras`, and both must be given; `max_tokens_per_step` is
    `max_num_batched_tokens`.

    The scheduler `trtllm_pytorch` makes it TensorRT-LLM's PyTorch backend. Its caches are sized as above or, with
    `module_layer_pages`, as `max_loras` and `max_cpu_loras` size them. `lora_slots` limits the adapters of a batch that
    only decodes, as CUDA graphs do; None is no limit. `lora_load_ns` is how long the loop stands still when it reads an
    adapter from its files. After `step_errors_max` failed steps the loop ends; None is no limit.

    Raises ValueError if the numbers contradict each other.
    """

    shape: ModelShape
    dtype: str = "float16"
    tp: int = 1
    lora_modules: tuple[str, ...]
    max_lora_rank: int = 64
    max_batch_size: int = 64
    max_input_tokens: int
    max_seq_tokens: int
    max_tokens_per_step: int = 8192
    kv_blocks: int
    tokens_per_block: int = 64
    scheduler: str = GUARANTEED_NO_EVICT
    lora_optimal_rank: int = 8
    lora_max_rank_cached: int = 64
    lora_host_bytes: int = 1 << 30
    lora_device_bytes: int = 1 << 30
    lora_host_pages: int | None = None
    lora_device_pages: int | None = None
    lora_put_workers: int = 4
    max_queue: int = 0
    lora_slots: int | None = None
    lora_load_ns: int = 0
    step_errors_max: int | None = None

    def __post_init__(self) -> None:
        known = module_dims(self.shape)
        unknown = [name for name in self.lora_modules if name not in known]
        if unknown:
            raise ValueError(f"unknown LoRA module {unknown[0]!r}; the shape has {', '.join(known)}")
        if self.scheduler not in (*SCHEDULERS, *_OTHERS):
            raise ValueError(f"unknown scheduler {self.scheduler!r}; there are {', '.join((*SCHEDULERS, *_OTHERS))}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPE_BYTES)}")
        if self.scheduler == VLLM:
            self._check_slots()
        elif self.lora_modules:
            self._check_room("host", self.lora_host_bytes, self.lora_host_pages)
            self._check_room("device", self.lora_device_bytes, self.lora_device_pages)

    def _check_slots(self) -> None:
        on_gpu, on_cpu = self.lora_device_pages, self.lora_host_pages
        if self.lora_modules and (on_gpu is None or on_cpu is None or not 1 <= on_gpu <= on_cpu):
            raise ValueError(
                f"vLLM counts adapters: give lora_device_pages (max_loras, 1 or more) and lora_host_pages "
                f"(max_cpu_loras, no fewer), not {on_gpu} and {on_cpu}"
            )

    def _check_room(self, tier: str, size_bytes: int, pages_given: int | None) -> None:
        if pages_given is not None:
            return
        slots = pages.slots_of_bytes(size_bytes, self.page_width, self.dtype)
        needed = pages.slots_minimum(self.geometry, self.max_rank_cached)
        if slots < needed:
            raise ValueError(
                f"Not enough space allocated to {tier} LoRA cache to hold 1 max sized LoRA {slots} < {needed}"
            )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def longest_sequence_tokens(self) -> int:
        """Tokens of the longest sequence: as built, less if the KV blocks hold less."""
        return min(self.max_seq_tokens, self.kv_blocks * self.tokens_per_block)

    @property
    def max_rank_cached(self) -> int:
        """The rank that the caches are sized for."""
        return min(self.lora_max_rank_cached, self.max_lora_rank)

    @cached_property
    def modules(self) -> dict[int, ModuleDims]:
        """The enabled LoRA modules by id, with global dims."""
        dims = module_dims(self.shape)
        return {dims[name].module_id: dims[name] for name in self.lora_modules}

    @cached_property
    def geometry(self) -> Geometry:
        """The page geometry of both adapter caches; ValueError without LoRA modules."""
        if not self.lora_modules:
            raise ValueError("an engine without LoRA modules has no adapter cache")
        optimal = min(self.lora_optimal_rank, self.max_lora_rank)
        modules = self.modules.values()
        return pages.geometry(modules, self.shape.layers, self.tp, optimal, self.max_rank_cached)

    @property
    def page_width(self) -> int:
        """Elements in a slot."""
        return self.geometry.page_width

    @property
    def slots_per_page(self) -> int:
        """Slots in a page."""
        return self.geometry.slots_per_page

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.page_width * self.dtype_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.slots_per_page * self.slot_bytes

    @cached_property
    def host_pages(self) -> int:
        """Pages of the host cache: 0 without LoRA modules."""
        return self._pages(self.lora_host_bytes, self.lora_host_pages)

    @cached_property
    def device_pages(self) -> int:
        """Pages of the device cache: 0 without LoRA modules."""
        return self._pages(self.lora_device_bytes, self.lora_device_pages)

    def _pages(self, size_bytes: int, pages_given: int | None) -> int:
        if not self.lora_modules:
            return 0
        if pages_given is not None:
            return pages_given
        slots = pages.slots_of_bytes(size_bytes, self.page_width, self.dtype)
        return pages.pages_of_slots(slots, self.slots_per_page)


def module_layer_pages(spec: EngineSpec, adapters: int) -> int:
    """Return the pages of a cache for so many adapters of the largest rank on all modules and layers.

    TensorRT-LLM's PyTorch backend sizes its caches by this from max_loras and max_cpu_loras. An adapter of a lower rank
    takes fewer pages, so more adapters than that fit.
    """
    rows = spec.max_lora_rank * spec.shape.layers * len(spec.lora_modules) * adapters
    widest = max(sum(dims) for dims in spec.geometry.dims.values())
    return pages.pages_of_slots(pages.slots_of_module_layers(rows, widest, spec.page_width), spec.slots_per_page)


def engine_config_json(spec: EngineSpec) -> dict[str, Any]:
    """Return the engine's `config.json` as TensorRT-LLM writes it, as far as a reader needs it."""
    hf_of = {ours: theirs for theirs, ours in HF_MODULES.items()}
    shape = spec.shape
    return {
        "version": "0.19.0",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": spec.dtype,
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_size": shape.head_size,
            "intermediate_size": shape.ffn,
            "mapping": {"world_size": spec.tp, "tp_size": spec.tp, "pp_size": 1},
        },
        "build_config": {
            "max_input_len": spec.max_input_tokens,
            "max_seq_len": spec.max_seq_tokens,
            "max_batch_size": spec.max_batch_size,
            "max_num_tokens": spec.max_tokens_per_step,
            "lora_config": {
                "lora_dir": [],
                "lora_ckpt_source": "hf",
                "max_lora_rank": spec.max_lora_rank,
                "lora_target_modules": list(spec.lora_modules),
                "trtllm_modules_to_hf_modules": {name: hf_of[name] for name in spec.lora_modules if name in hf_of},
            },
            "plugin_config": {
                "lora_plugin": spec.dtype if spec.lora_modules else None,
                "tokens_per_block": spec.tokens_per_block,
            },
        },
    }


def spec_from_engine_config(config: dict[str, Any], **runtime: Any) -> EngineSpec:
    """Return the spec of a built engine; `runtime` gives what is not built in (`kv_blocks`, cache sizes, scheduler).

    Runtime values override built ones. Raises KeyError for a field that is missing in `config`.
    """
    model, build = config["pretrained_config"], config["build_config"]
    built: dict[str, Any] = {
        "shape": _shape_of(model),
        "dtype": model["dtype"],
        "tp": model["mapping"]["tp_size"],
        "lora_modules": tuple(build["lora_config"]["lora_target_modules"]),
        "max_lora_rank": build["lora_config"]["max_lora_rank"],
        "max_batch_size": build["max_batch_size"],
        "max_input_tokens": build["max_input_len"],
        "max_seq_tokens": build["max_seq_len"],
        "max_tokens_per_step": build["max_num_tokens"],
        "tokens_per_block": build["plugin_config"].get("tokens_per_block", 64),
    }
    return EngineSpec(**(built | runtime))


def _shape_of(model: dict[str, Any]) -> ModelShape:
    shape = ModelShape(
        name="custom",
        hidden=model["hidden_size"],
        layers=model["num_hidden_layers"],
        heads=model["num_attention_heads"],
        kv_heads=model["num_key_value_heads"],
        head_size=model["head_size"],
        ffn=model["intermediate_size"],
        vocab=model["vocab_size"],
    )
    same = (known for known in SHAPES.values() if _numbers(known) == _numbers(shape))
    return next(same, shape)


def _numbers(shape: ModelShape) -> tuple[int, ...]:
    sizes = (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_size)
    return (*sizes, shape.ffn, shape.vocab)
