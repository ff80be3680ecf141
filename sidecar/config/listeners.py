"""Where the process listens, and how much one client can take of each listener."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator

from sidecar.config.section import LOOPBACK, Section, Tls, is_address


def _of_tcp(address: str) -> str:
    if not is_address(address, port_min=0):
        raise ValueError("it must be HOST:PORT, as 0.0.0.0:9000 or [::]:9000; port 0 takes a free one")
    return address


def _of_grpc(address: str) -> str:
    return address if address.startswith("unix:") else _of_tcp(address)


Address = Annotated[str, AfterValidator(_of_tcp)]
GrpcAddress = Annotated[str, AfterValidator(_of_grpc)]
_ORIGIN = re.compile(r"https?://[^/?#\s@,*]+")
_ORIGIN_FORM = "name scheme, host and perhaps port, as browsers do"


class Listener(Section):
    address: GrpcAddress
    tls: Tls | None = None


def is_local(address: str) -> bool:
    """Return True if only this machine reaches a HOST:PORT."""
    return address.rpartition(":")[0].strip("[]") in LOOPBACK


class GrpcListener(Listener):
    """Limits of a gRPC listener's connections. One without calls is closed after `idle_s`, one that has not begun
    HTTP/2 after `handshake_s`; beyond `connections_max` new ones are closed at once.
    """

    connections_max: int = Field(4096, ge=1)
    calls_per_connection_max: int = Field(128, ge=1)
    handshake_s: float = Field(10.0, gt=0, le=2_000_000)
    idle_s: float = Field(15.0, gt=0, le=2_000_000)


class AdminListener(GrpcListener):
    """The listener for operators. It must be on loopback unless it has TLS and a token file, or TLS with client
    certificates. `allow_cleartext` allows tokens without TLS, for a network that encrypts. `message_bytes_max` bounds
    one message; an adapter is pushed in messages of at most 1 MiB.
    """

    address: GrpcAddress = "127.0.0.1:9001"
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
    """The listener for gRPC clients. After `max_connection_age_s` (±10%) a connection takes no new calls, and a stream
    is closed when nothing is in flight on it, so that clients reconnect through a load balancer and find new replicas.
    `message_bytes_max` bounds one message, weights that a client sends included. A KServe stream is one call with many
    requests; once `requests_per_connection_max` are open on a connection's streams no more are read.
    """

    address: GrpcAddress = "127.0.0.1:9000"
    requests_per_connection_max: int = Field(1024, ge=1)
    message_bytes_max: int = Field(64 << 20, ge=4096, lt=1 << 31)
    max_connection_age_s: float | None = Field(None, gt=0, le=2_000_000)


class HttpListener(Listener):
    """The listener of the OpenAI API. `body_bytes_max` bounds one request, `prompts_max` the prompts of one completion.
    With `probes` it also has health and metrics, for one more release. Pages of `cors_origins`, such as
    `https://chat.example.com`, may ask it from a browser; "*" means every page. No page reads health and metrics.
    """

    address: Address = "127.0.0.1:9002"
    connections_max: int = Field(4096, ge=1)
    body_bytes_max: int = Field(16 << 20, ge=1024)
    prompts_max: int = Field(1024, ge=1)
    probes: bool = True
    cors_origins: tuple[str, ...] = ()

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                why = "a part of it cannot be *, so name each origin" if "*" in origin else _ORIGIN_FORM
                raise ValueError(f'"{origin[:80]}" is no origin: {why}')
        return origins


class ProbesListener(Section):
    """The listener of liveness, readiness and metrics, apart from clients, since metrics name adapters and tenants. Off
    without an address.

    It takes few connections, each for one answer.
    """

    address: Address | None = None
    tls: Tls | None = None
    connections_max: int = Field(32, ge=1)


class DrainListener(Section):
    """The listener of `POST /drain`, which returns once idle; call it from the engine's preStop hook. Off without an
    address, and on loopback only.
    """

    address: Address | None = None

    @field_validator("address")
    @classmethod
    def _is_local(cls, address: str | None) -> str | None:
        if address is not None and not is_local(address):
            raise ValueError(f"{address} is reachable from other machines, and who drains it stops all service")
        return address


class EndpointPickerListener(GrpcListener):
    """The listener of Envoy's external processing and access logs, by which a gateway has the sidecar pick engines. Off
    without an address.

    `override_mode` asks gateways that buffer bodies to stream answers, where they allow it. `in_path` is where Envoy
    reaches the http listener, to which it sends requests whose tokens must all be seen; `in_path_grpc` is where it
    reaches the data listener, for calls. Host names are resolved by the sidecar, for each request. With
    `estimates_allowed`, requests of tenants with token budgets are carried by Envoy, too, and charged by bytes. With
    `one_request_per_stream` a KServe stream has one request, and ends with its answer; streams that stay open then do
    not use `in_path_grpc`.
    """

    address: GrpcAddress | None = None  # type: ignore[assignment]
    calls_per_connection_max: int = Field(4096, ge=1)
    idle_s: float = Field(3600.0, gt=0, le=2_000_000)
    override_mode: bool = False
    in_path: Address | None = None
    in_path_grpc: Address | None = None
    estimates_allowed: bool = False
    one_request_per_stream: bool = False


class Listeners(Section):
    """`arriving_bytes_max` bounds the incomplete messages and bodies of all listeners together. One that is incomplete
    after `arrival_s` is given up.
    """

    arriving_bytes_max: int = Field(256 << 20, ge=1 << 20)
    arrival_s: float = Field(30.0, gt=0)
    data: DataListener = DataListener()
    admin: AdminListener = AdminListener()
    http: HttpListener = HttpListener()
    probes: ProbesListener = ProbesListener()
    endpoint_picker: EndpointPickerListener = EndpointPickerListener()
    drain: DrainListener = DrainListener()
