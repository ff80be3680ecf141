"""Records for tests of registries, and registries over a Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sidecar.config.redis_address import RedisLocation, parse_address
from sidecar.core.facts import Adapter, Row
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.state.redis.link import Link
from sidecar.state.redis.registry import RedisRegistry


def adapter(seed: int = 1, layers: int = 2) -> Adapter:
    rows = tuple(Row("attn_q", 1, layer, 8, 64, 64) for layer in range(layers))
    return Adapter(f"{seed:064x}", "base", rows, "float16")


def record(name: str, seed: int = 1, labels: tuple[tuple[str, str], ...] = (), **fields: Any) -> Record:
    """Return a new name's record; `fields` are those of Record."""
    made, _ = records.added(None, name, adapter(seed), f"/adapters/{name}", now=1.5, labels=labels)
    return replace(made, **fields)


def link_to(url: str, **place: Any) -> Link:
    return Link(RedisLocation(parse_address(url), **place))


@asynccontextmanager
async def shared_registry(url: str, member: str = "", **place: Any) -> AsyncIterator[RedisRegistry]:
    """Start a replica's registry."""
    registry = RedisRegistry(link_to(url, **place), member)
    try:
        await registry.start()
        yield registry
    finally:
        await registry.close()
