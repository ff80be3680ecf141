"""This process as one of several replicas: its identity, its listener for the others, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import random
from secrets import token_hex
from socket import gethostname
from time import time
from typing import TYPE_CHECKING

from sidecar.backends.credentials import open_channel
from sidecar.config import Config, plugins
from sidecar.config.backends import Backend as Entry
from sidecar.config.shared import Replicas
from sidecar.errors import Refused
from sidecar.ownership.facts import Bounds, Member
from sidecar.replicas.replica import Replica
from sidecar.serve.listening import Listening
from sidecar.serve.peers_only import PeersOnly, names_in
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import ReplicaFigures
from sidecar.state.registry import Registry

if TYPE_CHECKING:
    from sidecar.state.redis.link import Link


def member_of(replicas: Replicas) -> Member:
    """Return the identity of this replica for the life of this process."""
    name = replicas.name or gethostname()
    return Member(f"{name}-{token_hex(4)}", name, replicas.weight)


def link_of(config: Config) -> Link | None:
    """Return the connection to the Redis that holds the names; None without one."""
    if config.state.url is None:
        return None
    from sidecar.state.redis.link import Link  # the client is imported only if there is a Redis

    return Link(config.state.location)


async def join(
    config: Config,
    entries: Sequence[Entry],
    gateway: Gateway,
    registry: Registry,
    link: Link,
    member: Member,
    listening: Listening,
) -> Replica:
    """Return this replica with its listener for the others; once started, it is one of them.

    Raises Misused(STATE_INCOMPATIBLE) beside a replica of another wire format.
    """
    from sidecar.replicas.leases import RedisLeases
    from sidecar.state.redis.members import RedisMembers

    wanted = config.replicas
    server, address = listening.server(wanted.listener, "replicas", _guards(config))
    here = wanted.advertise or _reached_at(address)
    bounds = Bounds.of_lease(int(wanted.lease_s * 1e9))
    members = RedisMembers(link, bounds)
    with suppress(Refused):  # Redis is away, and the names are those that were kept
        await members.refuse_other_wires()
    leases = RedisLeases(members, member, here, lambda: registry.last_change, wanted.lease_s)
    tls = None if wanted.tls is None else wanted.tls.model_dump(exclude_none=True)
    replica = Replica(
        gateway,
        member,
        here,
        {backend.identity: "" for backend in entries if backend.discover is None},
        leases,
        bounds,
        random(),
        lambda to: open_channel(to, tls),
        plugins.policies_of(config.core()).routing,
    )
    replica.add_to(server)
    return replica


def _guards(config: Config) -> tuple[PeersOnly, ...]:
    """Return what keeps clients from the replicas' port, where identity is enforced."""
    tls = config.replicas.tls
    if config.identity.mode != "enforce" or tls is None or tls.certificate is None:
        return ()
    return (PeersOnly(names_in(Path(tls.certificate).expanduser())),)


def figures_of(replica: Replica, registry: Registry) -> ReplicaFigures:
    """Return the figures between replicas."""
    away_since = registry.away_since
    return ReplicaFigures(
        replica.keeper.changes["taken"],
        replica.keeper.changes["given_up"],
        replica.router.forwards,
        replica.router.reroutes,
        replica.router.unowned,
        len(replica.members()),
        registry.lag,
        0.0 if away_since is None else time() - away_since,
    )


def _reached_at(address: str) -> str:
    """Return the address for other replicas: by this machine's name if the listener has all of its addresses."""
    host, _, port = address.rpartition(":")
    return f"{gethostname()}:{port}" if host in ("", "0.0.0.0", "[::]") else address
