"""Kernel times measured on GPUs, published by NVIDIA in the package aiconfigurator-core.

The package is an optional extra: it carries 80 MB of measurements and is needed only to make a cost file, never to use
one. It knows base models without adapters, and needs no GPU and no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeVar

from sidecar.errors import Misused, Reason, needs_extra
from sidecar.lab.calibrate.published import LORA

T = TypeVar("T")

PACKAGE = "aiconfigurator_core"
DTYPE = "bfloat16"
MEMORY_FRACTION = 0.9
STEP_TOKENS = 8192
"""Tokens that a step may read, for which the engine reserves memory for activations."""


@dataclass(frozen=True)
class Memory:
    """The use of a GPU's memory in bytes, and how many tokens of keys and values the rest holds."""

    total_bytes: int
    weights_bytes: int
    activations_bytes: int
    runtime_bytes: int
    token_bytes: int
    kv_tokens: int
    fraction_of: str


class Measured:
    """The published times of one model on one GPU in one engine, computed in bfloat16 on one GPU."""

    def __init__(self, model: str, gpu: str, engine: str) -> None:
        """Raises Misused if the package is missing or does not know the model, GPU or engine."""
        sdk = _Package()
        paths = {short_name(path): path for path in sdk.models()}
        self.model_path = paths.get(short_name(model)) or _unknown("model", model, paths)
        systems = sdk.systems()
        self.gpu = gpu if gpu in systems else _unknown("GPU", gpu, systems)
        versions = {name: known for name, known in systems[gpu].items() if name in LORA}
        self.engine = engine if engine in versions else _unknown("engine", engine, versions, f" for {gpu}")
        self.version = versions[engine][-1]
        self.package_version = version("aiconfigurator-core")
        self.memory: Memory = self._answer(lambda: sdk.memory(self))
        self._handle = self._answer(lambda: sdk.handle(self))

    @property
    def modes(self) -> dict[str, str]:
        """The data types of all computations, as the package names them."""
        return dict.fromkeys(("gemm_quant_mode", "kvcache_quant_mode", "fmha_quant_mode"), DTYPE)

    def decode_ms(self, batch: int, context: int) -> float:
        """Return the time of a decode step in ms."""
        return self._answer(lambda: float(self._handle.predict_decode_latency(batch, context, 2)))

    def prefill_ms(self, requests: int, tokens: int) -> float:
        """Return the time in ms of a step that reads prompts."""
        return self._answer(lambda: float(self._handle.predict_prefill_latency(requests, tokens)))

    def _answer(self, ask: Callable[[], T]) -> T:
        """Return the package's answer. Its errors share no base class, so any exception means that it has none."""
        try:
            return ask()
        except Exception as error:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"aiconfigurator-core has no times of {self.model_path} on one {self.gpu} in {self.engine} "
                f"{self.version}: {' '.join(str(error).split())}; take another model or GPU",
            ) from error


def short_name(path: str) -> str:
    """Return a model's short name: `llama-3.1-8b` for `meta-llama/Meta-Llama-3.1-8B`."""
    return path.rpartition("/")[2].lower().removeprefix("meta-")


def _unknown(what: str, name: str, known: Iterable[str], where: str = "") -> Any:
    there = ", ".join(sorted(known)) or "none"
    raise Misused(Reason.CONFIG_INVALID, f'no measurements of the {what} "{name}"{where}; there are {there}')


class _Package:
    """The part of the package that is used, imported when needed."""

    def __init__(self) -> None:
        logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it warns about defaults of other engines
        try:
            self._engine, self._databases, self._common, self._memory = (
                import_module(f"{PACKAGE}.sdk.{name}") for name in ("engine", "perf_database", "common", "memory")
            )
        except ModuleNotFoundError as error:
            raise Misused(Reason.CONFIG_INVALID, needs_extra("what is measured", "calibrate")) from error

    def models(self) -> list[str]:
        return sorted(self._common.get_default_models())

    def systems(self) -> dict[str, dict[str, list[str]]]:
        """Return the measured engine versions by GPU and engine."""
        found: dict[str, dict[str, list[str]]] = self._databases.get_supported_databases()
        return found

    def handle(self, wanted: Measured) -> Any:
        return self._engine.EngineHandle.compile(
            wanted.model_path, wanted.gpu, wanted.engine, backend_version=wanted.version, **wanted.modes
        )

    def memory(self, wanted: Measured) -> Memory:
        """Return the use of the memory; the two engines take their fraction of different amounts."""
        fraction_of = "free" if wanted.engine == "trtllm" else "total"
        estimate: dict[str, Any] = self._memory.estimate_kv_cache(
            wanted.model_path,
            wanted.gpu,
            wanted.engine,
            wanted.version,
            max_num_tokens=STEP_TOKENS,
            max_batch_size=256,
            memory_fraction_kind=f"of_{fraction_of}",
            memory_fraction_value=MEMORY_FRACTION,
            **wanted.modes,
        )
        parts = estimate["memory_breakdown"]
        return Memory(
            total_bytes=estimate["total_gpu_capacity_bytes"],
            weights_bytes=parts["weights_bytes"],
            activations_bytes=parts["activations_bytes"],
            runtime_bytes=parts["runtime_overhead_bytes"],
            token_bytes=estimate["kv_size_per_token_bytes"],
            kv_tokens=estimate["total_kv_size_tokens"],
            fraction_of=fraction_of,
        )
