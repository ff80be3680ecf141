"""Stores of keys and limits, and the keys in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sidecar.access.entries import Key
from sidecar.access.keys import KeyBook, new_secret
from sidecar.access.store import AccessStore
from sidecar.config.redis_address import RedisLocation, parse_address

STALE_MAX_S = 3600.0


@asynccontextmanager
async def access_store(
    data: Path | None = None, url: str | None = None, member: str = ""
) -> AsyncIterator[AccessStore]:
    """Start a store: in Redis with a URL, else in the data directory, else in memory."""
    if data is not None:
        data.mkdir(exist_ok=True)  # noqa: ASYNC240 — of the test
    store = AccessStore(data, None if url is None else RedisLocation(parse_address(url)), member)
    try:
        await store.start()
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def key_book(store: AccessStore, keys_file: Path | None = None) -> AsyncIterator[KeyBook]:
    book = KeyBook(store, keys_file, STALE_MAX_S)
    book.start()
    try:
        yield book
    finally:
        await book.close()


def new_key(tenant: str = "acme", **fields: Any) -> tuple[str, Key]:
    """Return a secret and its key."""
    key_id, secret, digest = new_secret()
    return secret, Key(id=key_id, sha256=digest, tenant=tenant, **fields)
