"""Relay a ticket's replies: shared by all fronts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic_ns
from typing import Any, TypeVar

from sidecar.backends.api import Reply, Ticket
from sidecar.backends.kind import Reader
from sidecar.backends.registry import model_kind
from sidecar.core.causes import ReadTooSlowly
from sidecar.core.effects import Dispatch, Settle
from sidecar.errors import Reason
from sidecar.fronts.status import id_metadata
from sidecar.shell.gateway import Gateway

Written = TypeVar("Written")

LOOK_S = 1.0
AFTER_END_S = 60.0
"""How long a complete answer waits for a client that does not read."""
STALLED = f"the client took nothing for {AFTER_END_S:.0f} s; read the answer as it comes"


def origin_parameters(ticket: Ticket, hide_backend: bool) -> dict[str, str | int | float]:
    """Return where an answer came from, by the names of response parameters."""
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
    if ticket.length_max is not None:
        parameters["lora_max_tokens"] = ticket.length_max
    if not hide_backend:
        parameters["lora_backend"] = dispatch.backend
    return parameters


def origin_of_all(tickets: Sequence[Ticket], hide_backend: bool) -> dict[str, str | int | float]:
    """Return the same for an answer made of several: all names, and the largest of each number."""
    found: dict[str, list[Any]] = {}
    for ticket in tickets:
        for name, value in origin_parameters(ticket, hide_backend).items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: ", ".join(all_) if isinstance(all_[0], str) else max(all_) for name, all_ in found.items()}


def origin_metadata(ticket: Ticket, hide_backend: bool) -> tuple[tuple[str, str], ...]:
    """Return the same as trailing metadata (`lora-version` and so on), with the request's id."""
    origin = tuple(
        (name.replace("_", "-"), str(value)) for name, value in origin_parameters(ticket, hide_backend).items()
    )
    return (*origin, *id_metadata(ticket.client_id))


def version_label(dispatch: Dispatch) -> str:
    """Return the version that answered as NAME@vN; "" for the base model."""
    return f"{dispatch.name}@v{dispatch.ordinal}" if dispatch.name else ""


def reader_of(gateway: Gateway, ticket: Ticket, is_text: bool) -> Reader:
    """Return a reader for an answer that has begun to come, as text or as token ids."""
    assert ticket.dispatch is not None, "an answer without a dispatch"
    asking = model_kind(gateway.fleet.kind_of(ticket.dispatch.backend)).asking
    assert asking is not None, "an answer of an engine that cannot be asked"
    return asking.reader(is_text)


async def relay(ticket: Ticket, write: Callable[[Reply], Awaitable[Written]]) -> Settle | None:
    """Write each reply as it comes; return the ending, or None when the final reply was written.

    `ticket.blocked_since_ns` is set while a write waits for the client. A client that does not read is cancelled in the
    end, and the write is interrupted. gRPC goes on waiting for it, so only the call's status can follow.
    """
    try:
        async with unless_stalled([ticket]) as patience:
            while True:
                item = await ticket.next()
                if isinstance(item, Settle):
                    return item
                ticket.blocked_since_ns = monotonic_ns()
                await write(item)
                ticket.blocked_since_ns = None
                if item.final:
                    return None
    except TimeoutError:
        if not patience.expired() or ticket.settled is None:
            raise
        return replace(ticket.settled, reason=Reason.CLIENT_STALLED, cause=ticket.settled.cause or ReadTooSlowly())


@asynccontextmanager
async def unless_stalled(tickets: Sequence[Ticket]) -> AsyncIterator[asyncio.Timeout]:
    """Interrupt a write that still waits for its client after all its tickets have ended: the timeout expires."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as patience:
        timer = loop.call_later(LOOK_S, lambda: look())

        def look() -> None:
            nonlocal timer
            if all(map(_is_over, tickets)) or any(map(_has_stalled, tickets)):
                patience.reschedule(loop.time())
            else:
                timer = loop.call_later(LOOK_S, look)

        try:
            yield patience
        finally:
            timer.cancel()


def _has_stalled(ticket: Ticket) -> bool:
    is_writing = ticket.blocked_since_ns is not None
    return is_writing and ticket.settled is not None and ticket.settled.reason is Reason.CLIENT_STALLED


def _is_over(ticket: Ticket) -> bool:
    """Return True if a complete answer has waited for its client for as long as it may."""
    since_ns = ticket.blocked_since_ns
    if ticket.settled is None or since_ns is None:
        return False
    return monotonic_ns() - max(since_ns, ticket.settled_ns) > AFTER_END_S * 1e9
