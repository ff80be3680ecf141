"""What outlives the process, and what it shares: journal, state, replicas, the cluster that it belongs to."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from sidecar.config.listeners import Listener
from sidecar.config.redis_address import KEY_PREFIX, RedisLocation, parse_address
from sidecar.config.section import Section, Tls, changed


class Journal(Section):
    """Off without a data directory. Ids, names, lengths and times; never prompts, tokens, weights or secrets."""

    enabled: bool = True
    segment_bytes: int = Field(16 << 20, ge=4096)
    segments_max: int = Field(8, ge=1)


class State(Section):
    """Where names are kept: without `url` in the data directory, for one replica; with it in a Redis for several.

    It is redis://HOST:PORT/DB, redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB or redis+cluster://HOST:PORT,HOST:PORT,
    with a USER@ if need be, and rediss for TLS. Installations that share a Redis have different key prefixes.

    A replica that says nothing for `member_ttl_s` is not waited for any more when a name changes.
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
    def place(self) -> RedisLocation:
        """Where the Redis is; there must be one."""
        assert self.url is not None
        tls = self.tls or Tls()
        files = (self.password_file, tls.ca, tls.certificate, tls.key)
        paths = [None if file is None else Path(file).expanduser() for file in files]
        return RedisLocation(parse_address(self.url), self.key_prefix, *paths)


class Replicas(Section):
    """Several replicas in front of one pool, each backend's queue in one of them. Off without an address.

    They listen to each other at `address` and are reached at `advertise`, by default that, with this machine's name if
    it stands for all of the machine's addresses.
    `name` is whose life this is when it is started again, by default this machine's. What a replica owns falls to
    another `lease_s` after it was lost.
    """

    address: str | None = None
    advertise: str | None = None
    name: str | None = None
    tls: Tls | None = None
    weight: float = Field(1.0, gt=0)
    lease_s: float = Field(10.0, ge=1.0, le=60.0)

    @property
    def listener(self) -> Listener:
        """Where the others are listened to; there must be an address."""
        assert self.address is not None
        return Listener(address=self.address, tls=self.tls)


class ClusterAdapters(Section):
    """What declares adapters: ConfigMaps that have `label`, of the form key=value,key=value, and LoraAdapters."""

    config_maps: bool = False
    custom_resources: bool = False
    label: str = Field("lora-sidecar.io/adapters=true", pattern=r"^([\w./-]+=[\w.-]*)(,[\w./-]+=[\w.-]*)*$")


class Kubernetes(Section):
    """The cluster that this process belongs to, as a pod or by KUBECONFIG. `namespace` is its own if none is named."""

    namespace: str = Field("", pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$")
    adapters: ClusterAdapters = ClusterAdapters()
