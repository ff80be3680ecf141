"""What a verification asks: the operator's order, the requests made from it, and their limits."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.errors import Reason, Refused
from sidecar.shell.evidence import Prompt

TENANT = "verify"
"""The tenant of a verification whose caller has none."""
PROMPTS = (
    "Hello, who are you?",
    "Write one sentence about the sea.",
    "List three things that a cook needs:",
    "Translate to SQL: the ten newest orders",
)
"""Asked if the operator gives none; the adapter's own probes are asked as well."""
TOKENS_DEFAULT = 24
TOKENS_MAX = 512
TIMEOUT_S_DEFAULT = 120
PROMPTS_MAX = 32
PROMPT_BYTES_MAX = 1 << 16
PROBES_MAX = 32
EXPECT_TOKENS_MAX = 256
INSTANCES_MAX = 8
"""How often a prompt is asked of a backend with several instances."""


@dataclass(frozen=True)
class Order:
    """An operator's order. Without backends all that can serve it are asked; without prompts, `PROMPTS`."""

    reference: str
    backends: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    tokens_max: int = TOKENS_DEFAULT
    timeout_s: float = TIMEOUT_S_DEFAULT


@dataclass(frozen=True)
class Question:
    """One request, of a version by its name and ordinal; None for the base model."""

    backend: str
    prompt: Prompt
    tokens_max: int
    timeout_s: float
    version: tuple[str, int] | None = None
    klass: str = "default"


def check_order(order: Order) -> None:
    """Raise Refused(INVALID_REQUEST) for an order above a limit."""
    if len(order.prompts) > PROMPTS_MAX:
        raise _refused(f"{len(order.prompts)} prompts are given and {PROMPTS_MAX} are taken")
    if not 1 <= order.tokens_max <= TOKENS_MAX:
        raise _refused(f"{order.tokens_max} tokens are asked for; an answer to compare has 1 to {TOKENS_MAX}")
    for prompt in order.prompts:
        if bool(prompt.text) == bool(prompt.token_ids):
            raise _refused("a prompt is a text or token ids, one of the two")
        if len(prompt.text.encode()) + 4 * len(prompt.token_ids) > PROMPT_BYTES_MAX:
            raise _refused(f"a prompt is longer than {PROMPT_BYTES_MAX} bytes")


def _refused(why: str) -> Refused:
    return Refused(Reason.INVALID_REQUEST, f"{why}; ask for less")
