"""The model, the adapters and the engines that the emulator's tests share.

The thirteen modules, their dims and the adapter are those of TensorRT-LLM's own cache tests: two layers, hidden 16, two
tensor-parallel ranks, rank 8 with rank 4 on the separate q, k and v.
"""

from sidecar.lab.engine.engine import Request
from sidecar.lab.engine.pages import Geometry, Row, geometry
from sidecar.lab.engine.shape import TINY, ModuleDims
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import StepBatch

MODULES = (
    ModuleDims(0, "attn_qkv", 16, 48, "out"),
    ModuleDims(1, "attn_q", 16, 16, "out"),
    ModuleDims(2, "attn_k", 16, 16, "out"),
    ModuleDims(3, "attn_v", 16, 16, "out"),
    ModuleDims(4, "attn_dense", 16, 16, "in"),
    ModuleDims(5, "mlp_h_to_4h", 16, 32, "out"),
    ModuleDims(6, "mlp_4h_to_h", 32, 16, "in"),
    ModuleDims(7, "mlp_gate", 16, 32, "out"),
    ModuleDims(8, "cross_attn_qkv", 16, 48, "out"),
    ModuleDims(9, "cross_attn_q", 16, 16, "out"),
    ModuleDims(10, "cross_attn_k", 16, 16, "out"),
    ModuleDims(11, "cross_attn_v", 16, 16, "out"),
    ModuleDims(12, "cross_attn_dense", 16, 16, "in"),
)
HALF_RANK = (1, 2, 3, 9, 10, 11)


def reference_geometry() -> Geometry:
    """The page geometry of the reference tests: optimal rank 8, largest rank 64."""
    return geometry(MODULES, layers=2, tp=2, optimal_rank=8, max_rank=64)


def reference_rows(rank: int = 8) -> tuple[Row, ...]:
    """An adapter on all modules and layers; at rank 8 it takes one page of the reference geometry."""
    return tuple(
        Row(module.module_id, layer, rank // 2 if module.module_id in HALF_RANK else rank)
        for module in MODULES
        for layer in range(2)
    )


class FlatCost:
    """A constant cost per step, plus a cost per token; copies and puts cost little."""

    def step_ns(self, batch: StepBatch) -> int:
        """A thousand, ten a prompt token, one a decoding request and a hundredth of the contexts."""
        contexts = batch.decoding_context_tokens // 100
        return 1000 + 10 * batch.context_tokens + batch.decoding + contexts + 5 * batch.adapter_requests

    def adapter_copy_ns(self, size_bytes: int) -> int:
        """A tenth of the bytes."""
        return size_bytes // 10

    def adapter_put_ns(self, size_bytes: int) -> int:
        """A fifth of the bytes."""
        return size_bytes // 5


ROWS = tuple(Row(module, layer, 8) for layer in range(2) for module in (1, 3))


def tiny_spec(**changes: object) -> EngineSpec:
    """A tiny engine on q and v: an adapter takes one page up to rank 16, two at rank 32, four at rank 64."""
    numbers: dict[str, object] = {
        "shape": TINY,
        "lora_modules": ("attn_q", "attn_v"),
        "max_batch_size": 4,
        "max_input_tokens": 100,
        "max_seq_tokens": 200,
        "kv_blocks": 64,
        "tokens_per_block": 16,
        "lora_host_pages": 4,
        "lora_device_pages": 2,
    }
    return EngineSpec(**(numbers | changes))


def adapter_request(request_id: int, task_id: int, tokens: int = 3, rank: int = 8, **changes: object) -> Request:
    """A request with its adapter's weights; the payload is the id's name."""
    rows = tuple(Row(row.module_id, row.layer, rank) for row in ROWS)
    return Request(request_id, 10, tokens, task_id, rows, f"weights {task_id}", **changes)
