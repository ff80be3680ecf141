"""The words of access: what a call presents, who that is, what may be done with what, and the decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

OPERATOR, PUBLISHER, VIEWER = ROLES = ("operator", "publisher", "viewer")
TIME_MAX = 253_402_300_799
"""The last second of the year 9999: what a credential says of its end is earlier."""


class Proof(Enum):
    """How a principal was proven."""

    NONE = "none"
    CLAIMED = "claimed"
    """The client said so itself: `tenant_from: metadata`, without identity."""
    LOCAL = "local"
    """A process of this machine calls the admin listener on loopback or on a Unix socket."""
    TOKEN_FILE = "token file"
    CERTIFICATE = "certificate"
    FORWARDED = "forwarded certificate"
    """A mesh's proxy verified the client's certificate and says so in `x-forwarded-client-cert`."""
    KEY = "key"
    TOKEN = "token"
    """A JWT of a configured issuer."""
    EXTERNAL = "external check"
    """The server of `identity.external` says so, with `proves`."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request as an external check is told it: `headers` are as they came, names in lower case.

    `path` has the query; of a gRPC call it is the method. `host` is "" where the protocol's library does not tell it.
    """

    method: str = ""
    path: str = ""
    protocol: str = ""
    host: str = ""
    headers: Iterable[tuple[str | bytes, str | bytes]] = ()


NO_HEAD = Head()


@dataclass(frozen=True, slots=True)
class Presented:
    """What a call presents, before anything of it is believed.

    `authorization` and `forwarded` have every value of the headers `authorization` and `x-forwarded-client-cert`, in
    the order in which they came. `certificate` has the names in the client's certificate, which TLS has verified.
    `peer` is the address of the connection as ip:port, an IPv6 address in brackets, or "unix"; `is_local` is True if
    only this machine can have made it. `head` is for an external check alone.
    """

    authorization: tuple[str, ...] = ()
    certificate: tuple[str, ...] = ()
    forwarded: tuple[str, ...] = ()
    peer: str = ""
    is_local: bool = False
    head: Head = NO_HEAD


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `subject` names the credential for people: a key's id, a token's `sub`, a certificate's name.

    `roles` are those that the credential itself carries; the policy may give more by tenant or group. `klass` is the
    class of its requests; "" lets the client choose. `expires_at` is in Unix seconds, None for a credential without an
    end.
    """

    tenant: str = ""
    proof: Proof = Proof.NONE
    subject: str = ""
    groups: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    klass: str = ""
    expires_at: float | None = None


class Action(Enum):
    """The closed set of what a principal may ask for."""

    INFER = "infer"
    INFER_VERSION = "infer_version"
    """Select a version that is not the current one."""
    LIST = "list"
    SHOW = "show"
    REGISTER = "register"
    """Bring a new version under a name, or forget the name."""
    PROMOTE = "promote"
    EVICT = "evict"
    """Move weights: evict, prefetch, pin, refresh, release."""
    PAUSE = "pause"
    DRAIN = "drain"
    CANCEL = "cancel"
    SEE_QUEUE = "see_queue"
    """See the requests of other tenants."""
    MANAGE = "manage"
    """Keys, limits, policies, audit and usage; the configuration, and the backends that it has."""


class Sort(Enum):
    """The kinds of resource."""

    ADAPTER = "adapter"
    VERSION = "version"
    BASE = "base"
    BACKEND = "backend"
    TENANT = "tenant"
    """The requests, keys, limits and usage of a tenant."""
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a call asks for, as the audit says it if it is denied before it is read; `verb` is what was called."""

    request_id: str = ""
    action: Action = Action.INFER
    verb: str = ""


INFERENCE = Purpose()


@dataclass(frozen=True, slots=True)
class Resource:
    """What is asked for. `labels` and `owner` (the label `owner`) are an adapter's; `ordinal` is a version's."""

    sort: Sort
    name: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    owner: str = ""
    allow: tuple[str, ...] | None = None
    ordinal: int | None = None
    is_current: bool = True
    base_model: str = ""


SYSTEM = Resource(Sort.SYSTEM)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an action is allowed, and the rule that decided, for the audit and for `access check --explain`."""

    allowed: bool
    by: str


class Policy(Protocol):
    """Decides what principals may do. It is pure: the same question has the same answer until it is replaced."""

    def decide(self, principal: Principal, action: Action, resource: Resource) -> Decision: ...
