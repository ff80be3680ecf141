"""What an engine's error text means.

Texts arrive wrapped: in the backend's `Executor failed process requestId …`, in `in ensemble '…', `, in a whole Python
traceback, in an older assertion's file and stack. So they are matched by substring, and in an order: the text of a
failed step quotes the cause, which may be the text of something harmless. A path that is gone is a miss as well: the
adapter's files are to be brought there again. A model that is unloaded, and one whose process has died, are lost: their
server stays ready and says so of each request.
"""

from __future__ import annotations

from sidecar.core.words import Fault

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


def classify(text: str) -> Fault:
    """Return the fault that an engine's words stand for; REJECTED for words that are not known."""
    for part, fault in _TEXTS:
        if part in text:
            return fault
    if "Failed to load LoRA adapter" in text and "No such file or directory" in text:
        return Fault.MISS
    if "Stub process" in text and "is not healthy" in text:
        return Fault.LOST
    if "Error storing task=" in text and "Assertion failed" in text:
        return Fault.PAGE_CLAIM
    return Fault.REJECTED
