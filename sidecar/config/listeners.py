"""Where the process listens, and how much of it one client can take."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from sidecar.config.section import Section, Tls


class Listener(Section):
    address: str
    tls: Tls | None = None


def is_local(address: str) -> bool:
    """Whether only this machine reaches a HOST:PORT."""
    return address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


class GrpcListener(Listener):
    """How much of it one client can take. A connection that asks for nothing is closed after `idle_s`, one that does
    not come to HTTP/2 after `handshake_s`; past `connections_max` new ones are closed at once.
    """

    connections_max: int = Field(4096, ge=1)
    calls_per_connection_max: int = Field(1024, ge=1)
    handshake_s: float = Field(10.0, gt=0, le=2_000_000)
    idle_s: float = Field(60.0, gt=0, le=2_000_000)


class AdminListener(GrpcListener):
    """Loopback, unless it has TLS and a token file, or TLS that asks its clients for certificates. `allow_cleartext`
    lets tokens come without TLS, for a network that encrypts by itself. `message_bytes_max` bounds one message; an
    adapter is pushed in messages of at most 1 MiB.
    """

    address: str = "127.0.0.1:9001"
    message_bytes_max: int = Field(4 << 20, ge=2 << 20, lt=1 << 31)
    token_file: str | None = None
    allow_cleartext: bool = False

    @model_validator(mode="after")
    def _is_protected(self) -> AdminListener:
        mutual = self.tls is not None and self.tls.ca is not None
        local = is_local(self.address) or self.address.startswith("unix:")
        if not (local or mutual or self.token_file):
            raise ValueError(
                f"{self.address} is reachable from other machines and unprotected; listen on 127.0.0.1, set "
                "token_file and tls, or set tls with a client ca"
            )
        if not (local or self.tls is not None or self.allow_cleartext):
            raise ValueError(
                f"{self.address} is reachable from other machines, and tokens would come in clear text; listen on "
                "127.0.0.1, set tls, or allow_cleartext: true where the network encrypts, as a mesh does"
            )
        return self


class DataListener(GrpcListener):
    """`max_connection_age_s`, give or take a tenth: from then on a connection takes no new calls, and a stream is
    closed when nothing is in flight on it. So clients come back to a load balancer, and find replicas that are new.
    `message_bytes_max` bounds one message, of which weights that clients send themselves are a part.
    """

    address: str = "0.0.0.0:9000"
    message_bytes_max: int = Field(64 << 20, ge=4096, lt=1 << 31)
    max_connection_age_s: float | None = Field(None, gt=0, le=2_000_000)


class HttpListener(Listener):
    """The OpenAI API. `body_bytes_max` bounds one request of it, `prompts_max` how many prompts a completion may ask
    for at once. With `probes` health and metrics are here as well, which is so for one more release.
    """

    address: str = "0.0.0.0:9002"
    connections_max: int = Field(4096, ge=1)
    body_bytes_max: int = Field(16 << 20, ge=1024)
    prompts_max: int = Field(1024, ge=1)
    probes: bool = True


class ProbesListener(Section):
    """Liveness, readiness and metrics, which name adapters and tenants: where clients are not. Off without an address.

    It takes few connections, each for one answer.
    """

    address: str | None = None
    tls: Tls | None = None
    connections_max: int = Field(32, ge=1)


class DrainListener(Section):
    """`POST /drain`, answered when nothing runs any more: for who stops the engine beside this process. Off without
    an address, and on loopback only.
    """

    address: str | None = None

    @field_validator("address")
    @classmethod
    def _is_local(cls, address: str | None) -> str | None:
        if address is not None and not is_local(address):
            raise ValueError(f"{address} is reachable from other machines, and who drains it stops all service")
        return address


class Listeners(Section):
    """`arriving_bytes_max` bounds what is on its way in over all of them: messages and bodies that have not come in
    full. One that has not after `arrival_s` is given up.
    """

    arriving_bytes_max: int = Field(256 << 20, ge=1 << 20)
    arrival_s: float = Field(30.0, gt=0)
    data: DataListener = DataListener()
    admin: AdminListener = AdminListener()
    http: HttpListener = HttpListener()
    probes: ProbesListener = ProbesListener()
    drain: DrainListener = DrainListener()
