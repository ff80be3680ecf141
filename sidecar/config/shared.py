"""What outlives the process or is shared with others: journal, state, replicas, the cluster."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from sidecar.config.listeners import GrpcAddress, Listener
from sidecar.config.redis_address import KEY_PREFIX, RedisLocation, parse_address
from sidecar.config.section import Section, Tls, changed


class Journal(Section):
    """Needs a data directory. It has ids, names, lengths and times; never prompts, tokens, weights or secrets."""

    enabled: bool = True
    segment_bytes: int = Field(16 << 20, ge=4096)
    segments_max: int = Field(8, ge=1)


class State(Section):
    """Where names are kept: in the data directory for one replica, or with `url` in a Redis for several.

    `url` is redis://HOST:PORT/DB, redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB or
    redis+cluster://HOST:PORT,HOST:PORT, with USER@ if needed, and rediss for TLS. Installations that share a Redis need
    different key prefixes.

    A change of a name no longer waits for a replica that has been silent for `member_ttl_s`.
    """

    url: str | None = None
    password_file: str | None = None
    key_prefix: str = Field(KEY_PREFIX, pattern=r"^[\w.:-]{1,64}$")
    tls: Tls | None = None
    member_ttl_s: float = Field(10.0, ge=1.0)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None:
            parse_address(url)
        return url

    @model_validator(mode="after")
    def _is_reached_as_its_url_says(self) -> State:
        given = sorted(changed(self) - {"url"})
        if self.url is None and given:
            raise ValueError(f"{', '.join(given)} without a url: names are kept in the data directory")
        if self.tls is not None and not parse_address(self.url or "").tls:
            raise ValueError("tls is set and the url's scheme is without TLS; let it begin with rediss")
        if self.tls is not None and (self.tls.certificate is None) != (self.tls.key is None):
            raise ValueError("tls needs certificate and key together")
        return self

    @property
    def location(self) -> RedisLocation:
        """The location of the Redis. `url` must be set."""
        assert self.url is not None
        tls = self.tls or Tls()
        files = (self.password_file, tls.ca, tls.certificate, tls.key)
        paths = [None if file is None else Path(file).expanduser() for file in files]
        return RedisLocation(parse_address(self.url), self.key_prefix, *paths)


class Replicas(Section):
    """Several replicas in front of one pool; each backend's queue is in one of them. Off without an address.

    They listen to each other at `address` and are reached at `advertise`, which defaults to `address`, with this
    machine's name for a wildcard.
    `name` identifies a replica across restarts; the default is this machine's name. `lease_s` after a replica was lost,
    another takes its backends.
    """

    address: GrpcAddress | None = None
    advertise: str | None = None
    name: str | None = None
    tls: Tls | None = None
    weight: float = Field(1.0, gt=0)
    lease_s: float = Field(10.0, ge=1.0, le=60.0)

    @property
    def listener(self) -> Listener:
        """The listener for the other replicas. `address` must be set."""
        assert self.address is not None
        return Listener(address=self.address, tls=self.tls)


class ClusterAdapters(Section):
    """Objects that declare adapters: ConfigMaps with `label`, of the form key=value,key=value, and LoraAdapters."""

    config_maps: bool = False
    custom_resources: bool = False
    label: str = Field("lora-sidecar.io/adapters=true", pattern=r"^([\w./-]+=[\w.-]*)(,[\w./-]+=[\w.-]*)*$")


class Kubernetes(Section):
    """The cluster of this process, as a pod or by KUBECONFIG. `namespace` defaults to its own."""

    namespace: str = Field("", pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$")
    adapters: ClusterAdapters = ClusterAdapters()
