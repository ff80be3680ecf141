"""What an engine's error text means. Texts arrive wrapped in prefixes, so they are matched by substring."""

from __future__ import annotations

from sidecar.core.words import Fault

_TEXTS: tuple[tuple[str, Fault], ...] = (
    ("not found in cache. Please send LoRA weights with request", Fault.MISS),
    ("There are no done tasks to evict", Fault.FULL),
    ("PEFT Cache is full", Fault.FULL),
    ("Encountered an error in forwardAsync function", Fault.WHOLE_ENGINE),
    ("Maximum queue size of", Fault.QUEUE_FULL),
    ("Unable to find shared memory region", Fault.UNKNOWN_REGION),
)


def classify(text: str) -> Fault:
    """Return the fault that an engine's words stand for; REJECTED for words that are not known."""
    for part, fault in _TEXTS:
        if part in text:
            return fault
    if "Error storing task=" in text and "Assertion failed" in text:
        return Fault.PAGE_CLAIM
    return Fault.REJECTED
