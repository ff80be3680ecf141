"""How a pool's engines are found, in place of one engine's address."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from sidecar.config.section import Section, is_address

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]")


class EndpointSlices(Section):
    """The endpoints of a Kubernetes Service, read from its EndpointSlices. `port` is a port's name or number.

    `namespace` defaults to that of this process.
    """

    service: str = Field(min_length=1)
    port: Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=1, lt=1 << 16)]
    namespace: str | None = None


class Discover(Section):
    """One way to find engines that come and go.

    `dns` is HOST:PORT; the host has an address for each engine, as a headless Service does, and is resolved every
    `every_s`. Answers without any address are believed only after `empty_s`.

    An engine that is no longer found gets nothing new. After `grace_s` it is forgotten once nothing runs there.
    """

    dns: str | None = None
    endpoint_slices: EndpointSlices | None = None
    every_s: float = Field(5.0, gt=0)
    empty_s: float = Field(30.0, ge=0)
    grace_s: float = Field(10.0, ge=0)

    @field_validator("dns")
    @classmethod
    def _is_a_place(cls, dns: str | None) -> str | None:
        if dns is not None and not is_address(dns):
            raise ValueError("it must be HOST:PORT, as in triton.my-namespace.svc:8001")
        return dns

    @model_validator(mode="after")
    def _is_one_way(self) -> Discover:
        if (self.dns is None) == (self.endpoint_slices is None):
            raise ValueError("it needs one of dns and endpoint_slices")
        return self

    @property
    def name(self) -> str:
        """The name that is looked up: the host, or the Service."""
        if self.endpoint_slices is not None:
            return self.endpoint_slices.service
        return (self.dns or "").rpartition(":")[0]


def label_of(name: str) -> str:
    """Return a discovered engine's name in a form fit for backend ids, metrics, file names and shells."""
    return _NOT_IN_IDS.sub("-", name)
