"""Who clients are: the credentials that are believed, and what happens to a call without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sidecar.config.listeners import is_local
from sidecar.config.section import Section, Tls, is_address

PLACE = "{tenant}"
"""Where a pattern has the tenant; `*` stands for any text without a slash or a colon."""


def _is_pattern(text: str) -> str:
    if text.count(PLACE) != 1:
        raise ValueError(f"it must contain {PLACE} once, as in spiffe://cluster.local/ns/{PLACE}/sa/*")
    if any(PLACE in part and "*" in part for part in re.split("[/:]", text)):
        # acme-prod-7 would be of the tenant acme or acme-prod by {tenant}-*, as whoever chose the name likes
        raise ValueError(f"{PLACE} and * may not be in one part between slashes or colons: the tenant would be a guess")
    return text


Pattern = Annotated[str, AfterValidator(_is_pattern)]


def _is_claim(path: str) -> str:
    """Raise ValueError for a path that no claim can have. A claim's own name may have dots, slashes and colons."""
    if path.startswith("$"):
        raise ValueError("a path begins with the name of a claim, not with $, as in realm_access.roles")
    if not all(path.split(".")) or path != path.strip() or not path.isprintable():
        raise ValueError("it must name a claim, or an object and a claim in it, as in realm_access.roles")
    return path


Claim = Annotated[str, AfterValidator(_is_claim)]


def _mode(written: object) -> object:
    return "off" if written is False else written  # as YAML reads a bare off


Mode = Annotated[Literal["off", "observe", "enforce"], BeforeValidator(_mode)]


class Issuer(Section):
    """An issuer of JWTs, such as an OIDC provider or a Kubernetes API server.

    `jwks` is the https URL or the file of its keys. A URL is asked under the authority `jwks_ca` (default: the
    system's) and, if it wants credentials as a Kubernetes API server does, with the bearer token in `jwks_token_file`.
    The keys are fetched each `jwks_refresh_s` and count for `jwks_stale_max_s` after the last fetch that succeeded.

    `tenant`, `groups` and `class_claim` name claims; a dot steps into an object. A token without the claim of the
    tenant or the class is refused. `tenant_pattern` takes the tenant out of its claim. Only `algorithms` are accepted,
    of which none may be symmetric. `leeway_s` is the difference of clocks that is forgiven.
    """

    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks: str = Field(min_length=1)
    jwks_ca: str | None = None
    jwks_token_file: str | None = None
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...
    ] = Field(("RS256", "ES256"), min_length=1)
    tenant: Claim = "sub"
    tenant_pattern: Pattern | None = None
    groups: Claim | None = None
    class_claim: Claim | None = None
    leeway_s: float = Field(30.0, ge=0, le=300)
    jwks_refresh_s: float = Field(300.0, ge=1)
    jwks_stale_max_s: float = Field(24 * 3600.0, gt=0)

    @model_validator(mode="after")
    def _keys_come_safely(self) -> Self:
        parts = urlsplit(self.jwks)
        if parts.scheme == "http":
            raise ValueError("jwks over http can be forged on its way; use https, or a file")
        if parts.scheme not in ("", "https", "file"):
            raise ValueError("jwks must be an https URL or a file")
        if "@" in parts.netloc:
            raise ValueError("jwks holds a password, which a configuration should not; use jwks_token_file")
        if self.jwks_file is not None and (self.jwks_ca or self.jwks_token_file):
            raise ValueError("jwks is a file; jwks_ca and jwks_token_file are for a URL")
        return self

    @property
    def jwks_file(self) -> Path | None:
        """The file of its keys, None if they come from a URL."""
        parts = urlsplit(self.jwks)
        return None if parts.scheme == "https" else Path(parts.path).expanduser()


class Forwarded(Section):
    """Believe `x-forwarded-client-cert`, by which Istio's proxy passes on whose certificate it has verified.

    Anybody who reaches the listener without that proxy can write the header. So `strict_mutual_tls: true` has to assert
    that the mesh's PeerAuthentication is STRICT for this workload's ports.
    """

    strict_mutual_tls: Literal[True]


class Certificates(Section):
    """Take the tenant from the client's certificate, or the one that a mesh forwards: its SPIFFE id, else its first
    other alternative name, else its common name. `tenant_pattern` takes the tenant out of that name.
    """

    enabled: bool = False
    tenant_pattern: Pattern | None = None
    forwarded: Forwarded | None = None


SENT_HEADERS = (
    "authorization",
    "x-forwarded-client-cert",
    "x-request-id",
    "traceparent",
    "x-lora-tenant",
    "x-lora-class",
    "lora-tenant",
)
"""What an external check is sent of a call's headers by default; gRPC clients name their tenant in the last one."""
OWN_EXTENSIONS = ("tenant", "subject", "proof", "groups", "action", "verb")
"""The context extensions of a check that say what this process knows of a call."""
_HEADER = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def _is_header(name: str) -> str:
    name = name.lower()
    if not _HEADER.fullmatch(name):
        raise ValueError("it must name a header, as in x-team")
    if name.endswith("-bin"):
        raise ValueError("it names binary metadata of gRPC, which no header of a check can hold")
    return name


def _is_server(address: str) -> str:
    if not (is_address(address) or address.removeprefix("unix:").startswith("/")):
        raise ValueError("it must be HOST:PORT, as opa.policy.svc:9191, or unix:/PATH")
    return address


class External(Section):
    """Ask a server about each call, by the gRPC protocol of Envoy's `ext_authz`. What it denies is denied, and so is
    everything that it has not answered after `timeout_s`, or while `in_flight_max` other checks are under way.

    It is sent the `headers` that a call has, and `context_extensions` beside those that say who calls and what for.
    With `proves` it also says whose a call is, by `x-lora-tenant` in its answer, and no other credential is taken.
    Credentials go there, so that another machine needs `tls`, or `allow_cleartext` where the network encrypts.
    """

    address: Annotated[str, AfterValidator(_is_server)]
    tls: Tls | None = None
    allow_cleartext: bool = False
    timeout_s: float = Field(0.5, gt=0, le=10)
    in_flight_max: int = Field(1000, ge=1)
    headers: tuple[Annotated[str, AfterValidator(_is_header)], ...] = SENT_HEADERS
    context_extensions: dict[str, str] = {}
    proves: bool = False

    @model_validator(mode="after")
    def _credentials_travel_safely(self) -> Self:
        is_near = is_local(self.address) or self.address.startswith("unix:")
        if self.tls is None and not (is_near or self.allow_cleartext):
            raise ValueError(
                f"{self.address} is another machine, and clients' credentials would go there in clear text; set tls, "
                "or allow_cleartext: true where the network encrypts, as a mesh does"
            )
        return self

    @field_validator("context_extensions")
    @classmethod
    def _are_not_ours(cls, extensions: dict[str, str]) -> dict[str, str]:
        for name in extensions:
            if name in OWN_EXTENSIONS:
                raise ValueError(f"{name} is what the sidecar says of each call; name it otherwise")
        return extensions


class Identity(Section):
    """The credentials that prove who calls; the first that a call presents counts.

    With `mode: off` clients are believed (`tenant_from`). With `observe` nothing changes for clients either, and those
    who would be denied are counted and logged. With `enforce` a call without a valid credential is refused.

    `keys_file` lists API keys beside those of the registry. Keys from Redis are valid for `stale_max_s` without it.
    `on_revoked` says what happens to a running answer when its credential is revoked or ends. `local_admin` lets
    processes of this machine use an admin listener on loopback as operators without a credential. `external` asks a
    server about each call besides.
    """

    mode: Mode = "off"
    certificates: Certificates = Certificates()
    keys: bool = True
    keys_file: str | None = None
    issuers: tuple[Issuer, ...] = ()
    stale_max_s: float = Field(3600.0, gt=0)
    on_revoked: Literal["finish", "end"] = "finish"
    local_admin: bool = True
    external: External | None = None

    @model_validator(mode="after")
    def _proxies_are_not_operators(self) -> Self:
        if self.certificates.forwarded is not None and self.local_admin and self.mode == "enforce":
            raise ValueError(
                "certificates.forwarded with local_admin: behind a mesh's proxy every peer has a local address and "
                "would be an operator; set local_admin: false and give operators a token_file or a role"
            )
        return self

    @model_validator(mode="after")
    def _something_proves(self) -> Self:
        certificates = self.certificates.enabled or self.certificates.forwarded is not None
        external = self.external is not None and self.external.proves
        if self.mode == "enforce" and not (self.keys or self.issuers or certificates or external):
            raise ValueError("enforce without keys, issuers or certificates refuses everybody; allow one of them")
        return self

    @model_validator(mode="after")
    def _external_has_a_say(self) -> Self:
        if self.external is None:
            return self
        if self.mode == "off":
            raise ValueError(
                "external with mode: off: every client is believed then, and no server is asked; set mode: observe to "
                "see whom it would deny, then enforce"
            )
        certificates = self.certificates.enabled
        for name, is_taken in (("keys", self.keys), ("issuers", self.issuers), ("certificates.enabled", certificates)):
            if self.external.proves and is_taken:
                raise ValueError(
                    f"external.proves with {name}: two would say whose a call is; "
                    + ("set keys: false" if name == "keys" else f"leave {name} out, or external.proves")
                )
        return self

    @model_validator(mode="after")
    def _issuers_differ(self) -> Self:
        names = [issuer.issuer for issuer in self.issuers]
        if len(frozenset(names)) != len(names):
            raise ValueError("two issuers have the same name; list each once")
        return self
