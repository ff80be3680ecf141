"""Real-sized adapters: their files, what they weigh packed, and the same bytes in one plain message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import numpy as np

from sidecar.lab.engine.shape import LLAMA_31_8B, module_dims
from tests.bench import clients
from tests.kit.emulated import add_lora, core_request
from tests.kit.peft_files import ALL_LINEAR, QV, write_adapter

MODULES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h", "up_proj": "mlp_gate", "down_proj": "mlp_4h_to_h",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A LoRA of Llama-3.1-8B: its projections and rank."""

    modules: tuple[str, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of its packed form, the widest projection's."""
        dims = module_dims(LLAMA_31_8B)
        widths = [dims[MODULES[name]].in_dim + dims[MODULES[name]].out_dim for name in self.modules]
        return LLAMA_31_8B.layers * len(self.modules), self.rank * max(widths)

    @property
    def size_bytes(self) -> int:
        rows, width = self.shape
        return rows * width * 2

    def write(self, folder: Path, seed: int) -> Path:
        return write_adapter(
            folder, shape=LLAMA_31_8B, modules=self.modules, rank=self.rank, seed=seed, base_model_name_or_path="llama"
        )

    def message(self, task_id: int) -> bytes:
        """Return a load of so many zeros, as the sidecar sends it, ready to go."""
        dims = module_dims(LLAMA_31_8B)
        rows = [(dims[MODULES[name]].module_id, layer, self.rank) for layer in range(32) for name in self.modules]
        adapter = np.zeros(self.shape, np.float16), np.array(rows, np.int32)
        request = add_lora(core_request("", 1, streaming=True, request_id=f"raw-{task_id}"), task_id, adapter)
        return bytes(request.SerializeToString())


SMALL = Size(QV, 8)
FORTY_MB = Size(QV, 40)
THREE_HUNDRED_MB = Size(ALL_LINEAR, 36)


def engine_options(host_pages: int | None = None) -> tuple[str, ...]:
    """Return the options of an engine that takes such adapters without computing."""
    room = ("--lora-host-pages", str(host_pages)) if host_pages else ("--lora-host-bytes", str(4 << 30))
    return ("--shape", "llama-3.1-8b", "--compute", "none", "--lora-device-bytes", str(4 << 30), *room)


class PlainSender:
    """Sends prebuilt messages over one channel, blocking; what any gRPC client takes for these bytes."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=clients.OPTIONS)
        self._method: Any = self._channel.stream_stream(
            clients.STREAM_INFER, request_serializer=clients.as_they_are, response_deserializer=clients.as_they_are
        )

    def send(self, messages: Iterable[bytes]) -> float:
        """Send messages, each on a stream of its own, and return the seconds until all were answered."""
        began = perf_counter()
        for message in messages:
            for raw in self._method(iter([message])):
                clients.is_final(raw)
        return perf_counter() - began

    def close(self) -> None:
        self._channel.close()


def send_once(address: str, size: Size, task_id: int) -> None:
    """Build a message and send it; for a process of its own."""
    sender = PlainSender(address)
    sender.send([size.message(task_id)])
    sender.close()
