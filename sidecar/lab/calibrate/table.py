"""Make a cost table from measured step times, the GPU's memory and published figures about adapters."""

from __future__ import annotations

from sidecar.lab.calibrate.measured import DTYPE, MEMORY_FRACTION, Measured, Memory, short_name
from sidecar.lab.calibrate.published import COPY_SOURCE, LORA, PUBLISHED_FOR, TO_DEVICE, TO_HOST
from sidecar.lab.calibrate.refining import OnProgress, refined_grid
from sidecar.pace.cost_table import CostTable

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (16, 64, 256, 512, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
PROMPTS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
DECODE_TOLERANCE = 0.01
PREFILL_TOLERANCE = 0.03
"""Relative errors of interpolation along one axis; most steps of a run decode."""

GB = 1e9
TITLES = {"a100_sxm": "A100 SXM 80 GB"}
"""Display names of GPUs whose short name is not one."""


def measured_table(measured: Measured, on_progress: OnProgress = lambda what, done, total: None) -> CostTable:
    """Return the table of a model on a GPU in an engine. Raises Misused if measurements are missing.

    `on_progress` is called with what is being queried, and the progress.
    """
    memory, published = measured.memory, LORA[measured.engine]
    return CostTable(
        model=short_name(measured.model_path),
        gpu=TITLES.get(measured.gpu, measured.gpu),
        engine=f"{published.title} {measured.version}",
        dtype=DTYPE,
        source=(_step_source(measured), _FIXED_SOURCE, _kv_source(memory), _lora_source(measured), COPY_SOURCE),
        fixed_ms=round(measured.decode_ms(1, 1), 3),
        decode=refined_grid(measured.decode_ms, BATCHES, CONTEXTS, DECODE_TOLERANCE, on_progress, "decode steps"),
        prefill=refined_grid(measured.prefill_ms, REQUESTS, PROMPTS, PREFILL_TOLERANCE, on_progress, "prompts"),
        kv_tokens=memory.kv_tokens,
        kv_token_bytes=memory.token_bytes,
        to_device=TO_DEVICE,
        to_host=TO_HOST,
        lora=published.loss,
    )


_FIXED_SOURCE = "fixed_ms: the step time of a batch of one without context, which a mixed step pays once."


def _step_source(measured: Measured) -> str:
    modes = ", ".join(f"{name}={mode!r}" for name, mode in measured.modes.items())
    return (
        f"Step times: kernel times measured on the GPU, as published in aiconfigurator-core {measured.package_version} "
        f"(NVIDIA, Apache-2.0), queried through its EngineHandle.compile({measured.model_path!r}, {measured.gpu!r}, "
        f"{measured.engine!r}, backend_version={measured.version!r}, {modes}): decode by predict_decode_latency(batch, "
        "context, 2), prefill by predict_prefill_latency(requests, tokens). Unchanged, rounded to 1 us; points are "
        f"added where interpolation along an axis erred by more than {DECODE_TOLERANCE:.0%} (decode) or "
        f"{PREFILL_TOLERANCE:.0%} (prefill); small dips along the batch axis are in the measurements."
    )


def _lora_source(measured: Measured) -> str:
    source = LORA[measured.engine].source
    if (short_name(measured.model_path), measured.gpu) == PUBLISHED_FOR:
        return source
    return f"{source} Nothing is published for this model and GPU: that the same shares are lost is an assumption."


def _kv_source(memory: Memory) -> str:
    parts = (
        f"weights ({memory.weights_bytes / GB:.2f} GB), activations ({memory.activations_bytes / GB:.2f} GB) and run "
        f"time ({memory.runtime_bytes / GB:.2f} GB)"
    )
    total = f"{memory.total_bytes / 2**30:.0f} GiB"
    if memory.fraction_of == "free":
        return f"kv: {MEMORY_FRACTION} of what {total} leave beside {parts}, without adapter pages."
    return f"kv: {MEMORY_FRACTION} of {total}, less {parts}, without adapters."
