"""Classify an engine's error text.

Texts arrive wrapped: in the backend's `Executor failed process requestId …`, in `in ensemble '…', `, in a Python
traceback, in an assertion's file and stack. So they are matched by substring, and in order: the text of a failed step
quotes its cause, which may itself be harmless. A missing path counts as a miss: the adapter's files must be brought
there again. A model that is unloaded, or whose process has died, counts as lost: its server stays ready and answers
each request with that text.

Text that the client wrote itself does not count: see `quoting.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.core.enums import Fault

Wrote = Callable[[str], bool]
"""Returns True if a client wrote a text (ASCII, without quotes and backslashes) anywhere in its request."""

_TEXTS: tuple[tuple[str, Fault], ...] = (
    ("Encountered an error in forwardAsync function", Fault.WHOLE_ENGINE),
    ("not found in cache. Please send LoRA weights with request", Fault.MISS),
    ("lora_path does not exist on the Triton server's filesystem", Fault.MISS),
    ("There are no done tasks to evict", Fault.FULL),
    ("PEFT Cache is full", Fault.FULL),
    ("Maximum queue size of", Fault.QUEUE_FULL),
    ("Unable to find shared memory region", Fault.UNKNOWN_REGION),
    ("has no available versions", Fault.LOST),
    ("is not at ready state", Fault.LOST),
)


def nobody_wrote(part: str) -> bool:
    """Return False: for requests that no client wrote."""
    return False


def classify(text: str, wrote: Wrote = nobody_wrote) -> Fault:
    """Return the fault of an engine's error text; REJECTED if it is unknown or the client's own."""

    def says(part: str) -> bool:
        return part in text and not wrote(part)

    for part, fault in _TEXTS:
        if says(part):
            return fault
    if says("Failed to load LoRA adapter") and says("No such file or directory"):
        return Fault.MISS
    if says("Stub process") and says("is not healthy"):
        return Fault.LOST
    if says("Error storing task=") and says("Assertion failed"):
        return Fault.PAGE_CLAIM
    return Fault.REJECTED
