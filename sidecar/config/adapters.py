"""Where adapters come from, and how many bytes of them are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from sidecar.adapters.origins.allowing import AllowList
from sidecar.config.plugins import is_a
from sidecar.config.section import Section
from sidecar.errors import Misused


class Adapters(Section):
    """`roots` are folders that adapters may be registered from; each PEFT subfolder of `serve` is a name at start."""

    roots: tuple[str, ...] = ()
    serve: str | None = None
    allow: dict[str, tuple[str, ...]] = {}


class Origins(Section):
    """Origins from which adapters may be fetched. `allow` lists prefixes of URLs and folders, besides `adapters.roots`.

    `https://` alone allows every public host; a host with a private address must be named. The stores' own libraries
    find credentials, which are not configured here.
    """

    allow: tuple[str, ...] = ()
    size_bytes_max: int = Field(4 << 30, ge=1)
    attempts_max: int = Field(5, ge=1)
    timeout_s: float = Field(30.0, gt=0)
    duration_s_max: float = Field(1800.0, gt=0)
    downloads_max: int = Field(4, ge=1)

    @field_validator("allow")
    @classmethod
    def _are_prefixes(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        try:
            AllowList.of(allow)
        except Misused as error:
            raise ValueError(error.message.removeprefix("origins.allow: ")) from error
        return allow


class Store(Section):
    """Two tiers of packed adapters. The disk tier needs a data directory."""

    memory_bytes: int = Field(4 << 30, ge=1)
    disk_bytes: int = Field(32 << 30, ge=0)
    eviction: Annotated[str, is_a("eviction")] = "rate_per_byte"
    disk_eviction: Annotated[str, is_a("eviction")] = "lru"
    prefetch: Annotated[str, is_a("prefetch")] = "planned"
    prefetch_bytes_per_s: int = Field(128 << 20, ge=0)
    fetches_max: int = Field(4, ge=1)
