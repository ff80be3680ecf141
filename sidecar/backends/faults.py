"""What an engine's error text means.

Texts arrive wrapped: in the backend's `Executor failed process requestId …`, in `in ensemble '…', `, in a whole Python
traceback, in an older assertion's file and stack. So they are matched by substring, and in an order: the text of a
failed step quotes the cause, which may be the text of something harmless. A path that is gone is a miss as well: the
adapter's files are to be brought there again. A model that is unloaded, and one whose process has died, are lost: their
server stays ready and says so of each request.

What the client wrote itself does not count: see `quoting.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.core.enums import Fault

Wrote = Callable[[str], bool]
"""Whether a client wrote a text, ASCII without quotes and backslashes, somewhere in its request."""

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
    """Stand for a request without a client's words."""
    return False


def classify(text: str, wrote: Wrote = nobody_wrote) -> Fault:
    """Return the fault that an engine's words stand for; REJECTED for words that are not known, or are its client's."""

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
