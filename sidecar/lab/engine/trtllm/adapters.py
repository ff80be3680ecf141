"""The adapters that trtllm-serve has read: what is first read under a number stays, and nothing is ever removed.

The submit thread reads under the number as a string, the loop under the number: two copies, and each of them reads the
files once. So files that changed, or another path, are never seen again; files that changed between the two reads are.
"""

from __future__ import annotations

import asyncio

from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.trtllm.checkpoint import Adapter, LoadError, read_checkpoint
from sidecar.lab.engine.trtllm.fields import LoraRequest

UINT64_MAX = 2**64 - 1


class Adapters:
    """What Python keeps. `load_s` passes at each read."""

    def __init__(self, spec: EngineSpec, keeps_fp8: bool, load_s: float) -> None:
        self.submitted: dict[str, Adapter] = {}
        self.in_loop: dict[int, Adapter] = {}
        self._spec = spec
        self._keeps_fp8 = keeps_fp8
        self._load_s = load_s

    @property
    def size_bytes(self) -> int:
        """Bytes of host memory that all copies take on the first rank."""
        return sum(adapter.size_bytes for adapter in (*self.submitted.values(), *self.in_loop.values()))

    async def submit(self, request: LoraRequest) -> Adapter:
        """Return the adapter of a request's number, read now if the number is new. Raises LoadError."""
        number = request.lora_int_id
        known = self.submitted.get(str(number))
        if known is not None:
            return known
        if request.lora_ckpt_source != "hf":
            raise LoadError(f"No .nemo files found in directory {request.lora_path}")
        await asyncio.sleep(self._load_s)
        adapter = await asyncio.to_thread(self._read, request.lora_path, number)
        if not 0 <= number <= UINT64_MAX:
            raise LoadError("__init__(): incompatible function arguments.")
        self.submitted[str(number)] = adapter
        return adapter

    async def load_in_loop(self, number: int, path: str) -> Adapter:
        """Read the files for the loop, at a path that was good when the request was submitted. Raises LoadError."""
        adapter = await asyncio.to_thread(self._read, path, number)
        self.in_loop[number] = adapter
        return adapter

    def _read(self, path: str, number: int) -> Adapter:
        return read_checkpoint(path, number, self._spec, self._keeps_fp8)
