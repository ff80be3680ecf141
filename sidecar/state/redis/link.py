"""The connection to Redis: the client for each kind of address, credentials, and scripts.

Every script is idempotent (a write carries a token), so the client may resend a script that got no answer.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError

from sidecar.config.redis_address import RedisLocation
from sidecar.errors import Misused, Reason, Refused
from sidecar.files import file_for_ssl, read_regular_or_piped
from sidecar.state.codec import Codec, R
from sidecar.state.redis.entries import Entry, value_of
from sidecar.state.redis.scripts import Script
from sidecar.state.written import ADAPTERS

FAULTS = (RedisError, OSError, asyncio.TimeoutError, RuntimeError)
"""The errors that a command may raise when Redis is unreachable or refuses it.

The last one is uvloop's, for a write to a connection that was just closed; the client passes it on.
"""
CONNECT_S, ANSWER_S = 2.0, 3.0
"""The timeouts of a connection and of an answer; a blocking read blocks for less."""
SCANNED_AT_ONCE = 500
REGISTRY_KEYS = frozenset(("meta", "adapters", "changes", "tombstones", "applied"))
"""The names in scripts of the keys that each registry has for itself."""


class Announced(NamedTuple):
    """An entry of the stream of changes. `before` and `after` are the number and the mark of the preceding entry."""

    number: int
    before: int
    after: str
    mark: str
    name: str
    value: str


class PasswordFile(CredentialProvider):
    """A user name, and a file that holds the password; it is read for each connection."""

    def __init__(self, user: str, path: Path | None) -> None:
        self.sent = ""
        """The password that was read last."""
        self._user = user
        self._path = path

    def password(self) -> str:
        """Return the password, or "" without a file. Raises Misused if the file cannot be read."""
        if self._path is None:
            return ""
        try:
            self.sent = read_regular_or_piped(self._path.expanduser()).decode().strip()
        except OSError as error:
            raise Misused(Reason.CONFIG_INVALID, f"state.password_file: {self._path}: {error.strerror}") from error
        return self.sent

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        return (self._user, self.password()) if self._user else (self.password(),)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return await asyncio.to_thread(self.get_credentials)


class Link(Generic[R]):
    """A Redis and the keys of a registry in it; those of members and leases are the same in each link.

    To make one raises Misused(CONFIG_INVALID) for a file that cannot be read, whether or not Redis can be reached.
    """

    def __init__(self, place: RedisLocation, codec: Codec[R] = ADAPTERS) -> None:  # type: ignore[assignment]
        self.place = place
        self.codec = codec
        self._credentials = PasswordFile(place.address.user, place.password_file)
        self._credentials.password()
        self._client, *self._others = _clients(place, self._credentials)

    def __str__(self) -> str:
        return str(self.place.address)

    @property
    def label(self) -> str:
        """The address and the keys' prefix, for people and to tell one place from another."""
        return f"{self} {self.key('')}"

    def key(self, name: str) -> str:
        if name in REGISTRY_KEYS:
            name = self.codec.prefix + (self.codec.table if name == "adapters" else name)
        return f"{{{self.place.key_prefix}}}:{name}"

    async def run(self, script: Script, *arguments: str | int) -> Any:
        """Run a script. Raises FAULTS."""
        given = (len(script.keys), *(self.key(name) for name in script.keys), *arguments)
        try:
            return await self._client.evalsha(script.digest, *given)
        except NoScriptError:  # a new or restarted Redis does not know the script
            return await self._client.eval(script.text, *given)

    async def read(self, after: int, block_ms: int) -> list[Announced]:
        """Return the next changes, or [] if none comes within `block_ms`. Raises FAULTS."""
        key = self.key("changes")
        found = await self._client.xread({key: f"{after}-0"}, count=SCANNED_AT_ONCE, block=block_ms)
        return [_announced(number, fields) for _, entries in found or () for number, fields in entries]

    async def changes(self, first: int, last: int) -> list[Announced]:
        """Return the first changes of a range, at most a page of them. Raises FAULTS."""
        found = await self._client.xrange(self.key("changes"), str(first), str(last), count=SCANNED_AT_ONCE)
        return [_announced(number, fields) for number, fields in found]

    async def first_change(self) -> int:
        """Return the number of the oldest kept change, or 0 if there is none. Raises FAULTS."""
        found = await self._client.xrange(self.key("changes"), "-", "+", count=1)
        return int(found[0][0].partition("-")[0]) if found else 0

    async def entries(self) -> AsyncIterator[Mapping[str, str]]:
        """Yield the names' values, in pages; one that changes meanwhile may come twice. Raises FAULTS."""
        cursor = -1
        while cursor != 0:
            cursor, values = await self._client.hscan(self.key("adapters"), max(cursor, 0), count=SCANNED_AT_ONCE)
            yield values

    async def set_applied(self, member: str, number: int) -> None:
        """Store the last change that a member has read. Raises FAULTS."""
        await self._client.hset(self.key("applied"), member, str(number))

    async def schema(self) -> str | None:
        """Return the schema of the state, or None if there is no state. Raises FAULTS."""
        found = await self._client.hget(self.key("meta"), "schema")
        return None if found is None else str(found)

    async def restored_at(self) -> float:
        """Return the time (Unix seconds) at which the state was last written as a whole, or 0. Raises FAULTS."""
        return float(await self._client.hget(self.key("meta"), "restored_at") or 0)

    async def set_meta(self, **fields: str) -> None:
        await self._client.hset(self.key("meta"), mapping=fields)

    async def put_entries(self, entries: list[tuple[str, Entry[R]]]) -> None:
        """Write entries into a state that nobody else uses. Raises FAULTS."""
        await self._client.hset(
            self.key("adapters"), mapping={name: value_of(entry, self.codec) for name, entry in entries}
        )
        buried = {name: entry.head.time_ms for name, entry in entries if entry.record is None}
        if buried:
            await self._client.zadd(self.key("tombstones"), buried)

    async def put_changes(self, changes: list[Announced]) -> None:
        """Append changes to the stream of a state that nobody else uses. Raises FAULTS."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for number, before, after, mark, name, value in changes:
                fields = {"before": before, "after": after, "mark": mark, "name": name, "value": value}
                pipeline.xadd(self.key("changes"), fields, id=f"{number}-0")
            await pipeline.execute()

    async def erase(self) -> None:
        """Remove all our keys except those of members and leases. Raises FAULTS."""
        await self._client.delete(*(self.key(name) for name in ("meta", "adapters", "changes", "tombstones")))

    async def raise_times(self, name: str, times: Mapping[str, float]) -> None:
        """Store times by name in a sorted set; a stored time that is later stays. Raises FAULTS."""
        await self._client.zadd(self.key(name), dict(times), gt=True)

    async def times(self, name: str) -> dict[str, float]:
        """Return the stored times by name. Raises FAULTS."""
        return dict(await self._client.zrange(self.key(name), 0, -1, withscores=True))

    async def keys(self) -> list[str]:
        """Return all names that begin with our prefix, without it, sorted. Raises FAULTS."""
        begin = self.key("")
        pattern = re.sub(r"([][*?\\])", r"\\\1", begin) + "*"
        found = [key async for key in self._client.scan_iter(match=pattern, count=SCANNED_AT_ONCE)]
        return sorted({key.removeprefix(begin) for key in found})

    async def close(self) -> None:
        for client in (self._client, *self._others):
            await client.aclose()

    def describe(self, error: BaseException) -> str:
        """Return an error's text with our password removed, which a server may repeat."""
        text = " ".join(str(error).split()) or type(error).__name__
        password = self._credentials.sent
        return text.replace(password, "(hidden)") if password else text

    def refused(self, error: BaseException) -> Refused:
        """Return the error for an operation that failed because Redis is unavailable."""
        return Refused(Reason.STATE_UNAVAILABLE, f"this needs Redis at {self}: {self.describe(error)}; try again")


def is_final(error: BaseException) -> bool:
    """Return True if a retry cannot help because the configuration must change first."""
    below = error.__cause__ or error.__context__  # the client wraps TLS errors
    final = isinstance(error, AuthenticationError | NoPermissionError | ssl.SSLCertVerificationError)
    return final or (below is not None and is_final(below))


def _announced(number: str, fields: dict[str, str]) -> Announced:
    return Announced(
        int(number.partition("-")[0]),
        int(fields["before"]),
        fields["after"],
        fields["mark"],
        fields["name"],
        fields["value"],
    )


def _clients(place: RedisLocation, credentials: PasswordFile) -> list[Any]:
    """Return the client for commands, followed by clients that only locate it (Sentinels)."""
    address = place.address
    host, port = address.hosts[0]
    options: dict[str, Any] = _transport(place) | {
        "decode_responses": True,
        "encoding_errors": "surrogateescape",  # a damaged value must not keep the others from being read
        "protocol": 2,
    }
    if place.password_file is not None or address.user:
        options["credential_provider"] = credentials
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        return [RedisCluster(startup_nodes=nodes, retry=_retry(), **options)]
    options |= {"db": address.database, "retry": _retry()}
    if address.kind == "sentinel":
        sentinel = Sentinel(address.hosts, sentinel_kwargs=_transport(place), **options)
        return [sentinel.master_for(address.master), *sentinel.sentinels]
    return [Redis(host=host, port=port, **options)]


def _retry() -> Retry:
    return Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), 1)


def _transport(place: RedisLocation) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_S,
        "socket_timeout": ANSWER_S,
        "socket_keepalive": True,
    }
    if place.address.tls:
        options["ssl"] = True
        for option, path in (("ca_certs", place.ca), ("certfile", place.certificate), ("keyfile", place.key)):
            if path is not None:
                options[f"ssl_{option}"] = _pem(path)
    return options


def _pem(path: Path) -> str:
    try:
        return file_for_ssl(str(path.expanduser()))
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"state.tls: {path}: {error.strerror}") from error
