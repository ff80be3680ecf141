"""What every front does with a ticket: take replies as they come, tell where the answer came from, end once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic_ns
from typing import TypeVar

from sidecar.backends.api import Reply, Ticket
from sidecar.core.effects import Dispatch, Settle

Written = TypeVar("Written")


def origin_parameters(ticket: Ticket, hide_backend: bool) -> dict[str, str | int | float]:
    """Return where an answer came from, as response parameters and trailing metadata name it."""
    dispatch = ticket.dispatch
    if dispatch is None:
        return {}
    parameters: dict[str, str | int | float] = {
        "lora_version": version_label(dispatch),
        "lora_cache": dispatch.cache.value,
        "lora_queue_ms": round(dispatch.queue_ns / 1e6, 3),
        "lora_load_ms": round(dispatch.load_ns / 1e6, 3),
        "lora_heals": dispatch.heals,
    }
    if not hide_backend:
        parameters["lora_backend"] = dispatch.backend
    return parameters


def origin_metadata(ticket: Ticket, hide_backend: bool) -> tuple[tuple[str, str], ...]:
    """Return the same as trailing metadata, `lora-version` and so on."""
    return tuple(
        (name.replace("_", "-"), str(value)) for name, value in origin_parameters(ticket, hide_backend).items()
    )


def version_label(dispatch: Dispatch) -> str:
    return f"{dispatch.name}@v{dispatch.ordinal}" if dispatch.name else ""


async def relay(ticket: Ticket, write: Callable[[Reply], Awaitable[Written]]) -> Settle | None:
    """Write each reply as it comes; return the ending, None when the final reply was written.

    While a write waits for the client the ticket says since when: a client that takes nothing is cancelled in the end.
    """
    while True:
        item = await ticket.next()
        if isinstance(item, Settle):
            return item
        ticket.blocked_since_ns = monotonic_ns()
        await write(item)
        ticket.blocked_since_ns = None
        if item.final:
            return None
