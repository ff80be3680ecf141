"""One sequence in an emulated trtllm-serve."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.lab.engine.http.work import TextWork
from sidecar.lab.engine.trtllm.checkpoint import Adapter


@dataclass(eq=False, kw_only=True)
class TorchWork(TextWork):
    """A sequence. `adapter` is the submit thread's copy; with `sends` its weights go to the loop with the request."""

    adapter: Adapter | None = None
    path: str = ""
    sends: bool = False
